-- Rendered by corral from the inventory "everything.on", host gate; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_farm = {
    { name = "image", pool = "image", depth = 25, replicas = {
        { name = "big.iron-image-3", slots = 1, model = "image" },
    } },
    { name = "chat.big.iron-c-3", pool = "chat", depth = 20, replicas = {
        { name = "big.iron-c-3", slots = 2, model = "chat" },
        { name = "big.iron-c-4", slots = 2, model = "chat" },
    } },
    { name = "chat.ollama", pool = "chat", depth = 5, replicas = {
        { name = "ollama", slots = 1, model = "chat:3b" },
    } },
    { name = "embed", pool = "embed", depth = 25, replicas = {
        { name = "big.iron-embed-4", slots = 8, model = "embed" },
        { name = "big.iron-embed-4-2", slots = 8, model = "embed" },
    } },
    { name = "rank", pool = "rank", depth = 25, replicas = {
        { name = "gate-rank-1", slots = 4, model = "rank" },
    } },
    { name = "smart.big.iron-smart-1", pool = "smart", depth = 0, replicas = {
        { name = "big.iron-smart-1", slots = 1, model = "smart" },
    } },
    { name = "smart.studio", pool = "smart", depth = 0, replicas = {
        { name = "studio", slots = 8, model = "chat-70b" },
    } },
}
