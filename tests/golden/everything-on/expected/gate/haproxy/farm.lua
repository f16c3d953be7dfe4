-- Rendered by corral from the inventory "everything.on", host gate; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "image", pool = "image", depth = 25, background_depth = 0, probe_path = "/v1/images/generations", probe_body = "{\"model\": \"image\", \"prompt\": \"hi\", \"size\": \"64x64\", \"step\": 1}", replicas = {
        { name = "big.iron-image-3", slots = 1, model = "image" },
    } },
    { name = "chat.big.iron-c-3", pool = "chat", depth = 20, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "big.iron-c-3", slots = 2, model = "chat" },
        { name = "big.iron-c-4", slots = 2, model = "chat" },
    } },
    { name = "chat.ollama", pool = "chat", depth = 5, background_depth = 0, probe_path = "/api/chat", probe_body = "{\"model\": \"chat:3b\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"stream\": false, \"options\": {\"num_predict\": 1, \"max_tokens\": 1}}", replicas = {
        { name = "ollama", slots = 1, model = "chat:3b" },
    } },
    { name = "embed", pool = "embed", depth = 25, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"embed\", \"input\": \"hi\"}", replicas = {
        { name = "big.iron-embed-4", slots = 8, model = "embed" },
        { name = "big.iron-embed-4-2", slots = 8, model = "embed" },
    } },
    { name = "rank", pool = "rank", depth = 25, background_depth = 0, probe_path = "/v1/rerank", probe_body = "{\"model\": \"rank\", \"query\": \"hi\", \"documents\": [\"hi\"]}", replicas = {
        { name = "gate-rank-1", slots = 4, model = "rank" },
    } },
    { name = "smart.big.iron-smart-1", pool = "smart", depth = 0, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"smart\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "big.iron-smart-1", slots = 1, model = "smart" },
    } },
    { name = "smart.studio", pool = "smart", depth = 0, background_depth = 0, probe_path = "/llm/v1/chat/completions", probe_body = "{\"model\": \"chat-70b\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "studio", slots = 8, model = "chat-70b" },
    } },
}
