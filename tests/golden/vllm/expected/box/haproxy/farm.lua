-- Rendered by corral from the inventory "vllm", host box; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_farm = {
    { name = "quick", pool = "quick", depth = 10, replicas = {
        { name = "box-quick-4", slots = 1, model = "quick" },
    } },
    { name = "calm", pool = "calm", depth = 10, replicas = {
        { name = "box-calm-3", slots = 8, model = "calm" },
    } },
    { name = "chat", pool = "chat", depth = 10, replicas = {
        { name = "box-chat-1", slots = 16, model = "chat" },
    } },
}
