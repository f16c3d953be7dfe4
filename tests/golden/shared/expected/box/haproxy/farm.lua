-- Rendered by corral from the inventory "shared", host box; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "clever", pool = "clever", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"clever\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-clever-1", slots = 1, model = "clever" },
    } },
    { name = "coder", pool = "coder", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"coder\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-coder-1", slots = 2, model = "coder" },
    } },
    { name = "embed", pool = "embed", depth = 10, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"embed\", \"input\": \"hi\"}", replicas = {
        { name = "box-embed-cpu-1", slots = 4, model = "embed" },
    } },
    { name = "quick", pool = "quick", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"quick\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-quick-1", slots = 1, model = "quick" },
    } },
    { name = "rerank", pool = "rerank", depth = 10, background_depth = 0, probe_path = "/v1/rerank", probe_body = "{\"model\": \"rerank\", \"query\": \"hi\", \"documents\": [\"hi\"]}", replicas = {
        { name = "box-rerank-cpu-1", slots = 4, model = "rerank" },
    } },
    { name = "words", pool = "words", depth = 10, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"words\", \"input\": \"hi\"}", replicas = {
        { name = "box-words-cpu-1", slots = 4, model = "words" },
    } },
}
corral_shared = {
    { via = "", loaded = 1, turn_s = 60, members = {
        { name = "clever", pool = "clever", server = "box-clever-1", takes_turns = true, answer_s = 600, start_s = 600 },
        { name = "coder", pool = "coder", server = "box-coder-1", takes_turns = true, answer_s = 600, start_s = 600 },
        { name = "quick", pool = "quick", server = "box-quick-1", takes_turns = true, answer_s = 600, start_s = 600 },
    } },
    { via = "", loaded = 2, turn_s = 60, members = {
        { name = "embed", pool = "embed", server = "box-embed-cpu-1", takes_turns = true, answer_s = 300, start_s = 600 },
        { name = "rerank", pool = "rerank", server = "box-rerank-cpu-1", takes_turns = true, answer_s = 300, start_s = 600 },
        { name = "words", pool = "words", server = "box-words-cpu-1", takes_turns = true, answer_s = 300, start_s = 600 },
    } },
}
