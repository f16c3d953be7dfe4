-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_figures_file = "/tmp/figures"
corral_farm = {
    { name = "chat", pool = "chat", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"chat\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-chat-1", slots = 2, model = "chat" },
        { name = "box-chat-2", slots = 2, model = "chat" },
    } },
    { name = "embed", pool = "embed", depth = 10, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"embed\", \"input\": \"hi\"}", replicas = {
        { name = "box-embed-1", slots = 4, model = "embed" },
    } },
}
