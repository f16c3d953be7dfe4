-- Rendered by corral from the inventory "routing", host box; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "big", pool = "big", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"big\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-big-1", slots = 1, model = "big" },
    } },
    { name = "small", pool = "small", depth = 10, background_depth = 5, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"small\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "box-small-1", slots = 1, model = "small" },
    } },
    { name = "far", pool = "far", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"large\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "provider", slots = 8, model = "large" },
    } },
}
