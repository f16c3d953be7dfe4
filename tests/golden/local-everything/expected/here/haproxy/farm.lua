-- Rendered by corral from the inventory "local-all", host here; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "chat", pool = "chat", depth = 4, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "here-chat-1", slots = 2, model = "chat" },
        { name = "here-chat-2", slots = 2, model = "chat" },
    } },
    { name = "embed", pool = "embed", depth = 4, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"embed\", \"input\": \"hi\"}", replicas = {
        { name = "here-embed-1", slots = 4, model = "embed" },
    } },
    { name = "rank", pool = "rank", depth = 4, background_depth = 0, probe_path = "/v1/rerank", probe_body = "{\"model\": \"rank\", \"query\": \"hi\", \"documents\": [\"hi\"]}", replicas = {
        { name = "here-rank-1", slots = 4, model = "rank" },
    } },
}
