-- Rendered by corral from the inventory "heartcode", host prod; do not edit.
-- Change the inventory or templates/haproxy/farm.lua.j2, then run: ./generate.py render
-- What the other scripts know of the farm beside HAProxy's figures; nothing here is secret, and no address is in it.
corral_entry = "127.0.0.1:8081"
corral_farm = {
    { name = "heartcode-image", pool = "heartcode-image", depth = 4, background_depth = 0, probe_path = "/v1/images/generations", probe_body = "{\"model\": \"heartcode-image\", \"prompt\": \"hi\", \"size\": \"64x64\", \"step\": 1}", replicas = {
        { name = "pea-image-8", slots = 1, model = "heartcode-image" },
    } },
    { name = "heartcode-chat-nsfw", pool = "heartcode-chat-nsfw", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"heartcode-chat-nsfw\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "pea-gpu-4", slots = 1, model = "heartcode-chat-nsfw" },
        { name = "pea-gpu-5", slots = 1, model = "heartcode-chat-nsfw" },
        { name = "pea-gpu-6", slots = 1, model = "heartcode-chat-nsfw" },
        { name = "pea-gpu-7", slots = 1, model = "heartcode-chat-nsfw" },
    } },
    { name = "heartcode-chat-sfw", pool = "heartcode-chat-sfw", depth = 10, background_depth = 0, probe_path = "/v1/chat/completions", probe_body = "{\"model\": \"heartcode-chat-sfw\", \"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"max_tokens\": 1}", replicas = {
        { name = "pea-gpu-1", slots = 1, model = "heartcode-chat-sfw" },
        { name = "pea-gpu-2", slots = 1, model = "heartcode-chat-sfw" },
        { name = "pea-gpu-3", slots = 1, model = "heartcode-chat-sfw" },
    } },
    { name = "heartcode-embed", pool = "heartcode-embed", depth = 10, background_depth = 0, probe_path = "/v1/embeddings", probe_body = "{\"model\": \"heartcode-embed\", \"input\": \"hi\"}", replicas = {
        { name = "pea-embed-1", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-2", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-3", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-4", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-5", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-6", slots = 1, model = "heartcode-embed" },
        { name = "pea-embed-7", slots = 1, model = "heartcode-embed" },
    } },
}
