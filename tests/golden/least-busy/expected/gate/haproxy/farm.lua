-- Rendered by corral from the inventory "least-busy", host gate; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "chat.one-chat-1", pool = "chat", depth = 7, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "one-chat-1", slots = 3, model = "chat" },
        { name = "one-chat-2", slots = 3, model = "chat" },
    } },
    { name = "chat.mac", pool = "chat", depth = 3, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"mlx-community/Chat-8B-4bit\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "mac", slots = 2, model = "mlx-community/Chat-8B-4bit" },
    } },
}
