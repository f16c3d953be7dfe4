-- Rendered by corral from the inventory "least-busy", host gate; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_farm = {
    { name = "chat.one-chat-1", pool = "chat", depth = 7, replicas = {
        { name = "one-chat-1", slots = 3, model = "chat" },
        { name = "one-chat-2", slots = 3, model = "chat" },
    } },
    { name = "chat.mac", pool = "chat", depth = 3, replicas = {
        { name = "mac", slots = 2, model = "mlx-community/Chat-8B-4bit" },
    } },
}
