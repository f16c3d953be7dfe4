-- Rendered by corral from the inventory "neural-farm", host gateway; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "primary.pixel", pool = "primary", depth = 5, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"Qwen2.5-3B-Instruct-Q4_K_M\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "pixel", slots = 2, model = "Qwen2.5-3B-Instruct-Q4_K_M" },
    } },
    { name = "primary.iphone15", pool = "primary", depth = 2, background_depth = 0, probe_path = "/api/chat", probe_body = "{\"model\": \"llama-3.2-3b\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"stream\": false, \"options\": {\"num_predict\": 1, \"max_tokens\": 1}}", replicas = {
        { name = "iphone15", slots = 1, model = "llama-3.2-3b" },
    } },
    { name = "primary.iphone16", pool = "primary", depth = 3, background_depth = 0, probe_path = "/api/chat", probe_body = "{\"model\": \"qwen3-4b\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"stream\": false, \"options\": {\"num_predict\": 1, \"max_tokens\": 1}}", replicas = {
        { name = "iphone16", slots = 1, model = "qwen3-4b" },
    } },
    { name = "smart", pool = "smart", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"mlx-community/Qwen3-8B-4bit\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "mac", slots = 2, model = "mlx-community/Qwen3-8B-4bit" },
    } },
}
