-- Rendered by corral from the inventory "dragon", host gateway; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "command-a", pool = "command-a", depth = 20, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"mlx-community/command-a-03-2025-q8\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "command-a", slots = 2, model = "mlx-community/command-a-03-2025-q8" },
    } },
    { name = "nemotron-ultra", pool = "nemotron-ultra", depth = 20, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"Nemotron-Ultra-253B-v1-mlx-q5\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "nemotron", slots = 1, model = "Nemotron-Ultra-253B-v1-mlx-q5" },
    } },
    { name = "qwen3-14b", pool = "qwen3-14b", depth = 20, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"mlx-community/qwen-3-14b-lbrx-2.0-q8\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "qwen", slots = 4, model = "mlx-community/qwen-3-14b-lbrx-2.0-q8" },
    } },
    { name = "vision", pool = "vision", depth = 20, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"mlx-community/llama-scout-vlm\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "scout", slots = 2, model = "mlx-community/llama-scout-vlm" },
    } },
}
