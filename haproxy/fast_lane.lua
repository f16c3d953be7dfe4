-- The fast lane: plain requests of known keys go to their pool without LiteLLM.
--
-- LiteLLM remains the only judge of keys. With each of its answers it says in a header what the key may do
-- (corral_permit.py). This permit holds for a few seconds, for this key and this model; then one request asks LiteLLM
-- again. A request that is not plain, or that a limit of its pool could change, is passed to LiteLLM.
--
-- In a public frontend:       http-request lua.fast, which sets txn.fast, or txn.over for a key that is over its limits
-- In the backends of LiteLLM: http-response lua.permit
-- In the backend `Fast`:      http-response lua.failed, which sets txn.failed (status), txn.message and txn.code
--                             filter lua.usage, which counts requests and tokens for /usage and, since last asked, /-/usage
-- On the runtime API:         corral forget HASH, which ends all permits of a key at once

local RENEW_MS, LIMIT_MS = 4000, 8000   -- age at which one request renews a permit, and at which it ends
local RENEWAL_MS = 2000                 -- time for a renewal; meanwhile others use the old permit
local SETTLE_MS = 3000                  -- time after `forget` in which another worker of LiteLLM may not know yet
local OUTAGE_MS = 600000                -- age at which a permit ends while LiteLLM does not answer
local MINUTE_MS = 60000
local ALIVE_PATH = "/health/liveliness"
local OPENING_BYTES = 4096              -- of a conversation's opening, by which it is named
local JSON = "application/json"
local FORWARDED = { ["content-type"] = true, ["content-length"] = true, host = true, ["x-request-id"] = true }

local permits = {}      -- by hash of the key and model
local keys = {}        -- by hash of the key: its limits, and its requests in this minute in both lanes
local forgotten = {}   -- by hash of the key: when its permits were ended
local usage = {}       -- by key and pool: requests and tokens, and how many of each LiteLLM has been told of
local is_answering = true

-- --- plain requests: JSON in which every field is known

local function after_space(body, at)
    return body:find("[^ \t\r\n]", at) or #body + 1
end

local ESCAPES = { ['"'] = '"', ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- The text of a JSON string; nil if it is not valid.
local function unescaped(raw)
    local text = raw:gsub("\\\\", "\\u005c"):gsub('\\(["/bfnrt])', ESCAPES)
    local _, escapes = text:gsub("\\", "")
    local _, codes = text:gsub("\\u%x%x%x%x", "")
    if escapes ~= codes then
        return nil
    end
    text = text:gsub("\\u([dD][89abAB]%x%x)\\u([dD][c-fC-F]%x%x)", function(high, low)
        return utf8.char(0x10000 + (tonumber(high, 16) - 0xd800) * 1024 + tonumber(low, 16) - 0xdc00)
    end)
    if text:find("\\u[dD][89a-fA-F]") or text:find("\\u0000", 1, true) then
        return nil
    end
    return (text:gsub("\\u(%x%x%x%x)", function(code) return utf8.char(tonumber(code, 16)) end))
end

-- Each of these functions returns the value at a position and the position after it, or nil if it is not of its kind.

local function text_at(body, at)
    if body:byte(at) ~= 34 then
        return nil
    end
    local stop, has_escape = body:find('["\\]', at + 1), false
    while stop and body:byte(stop) == 92 do
        has_escape, stop = true, body:find('["\\]', stop + 2)
    end
    if not stop then
        return nil
    end
    local raw = body:sub(at + 1, stop - 1)
    if raw:find("[\1-\31]") then
        return nil
    end
    return has_escape and unescaped(raw) or not has_escape and raw or nil, stop + 1
end

local function flag_at(body, at)
    if body:find("^true", at) then
        return "true", at + 4
    end
    if body:find("^false", at) then
        return "false", at + 5
    end
end

local function number_at(least, most)
    return function(body, at)
        local digits, after = body:match("^(%d+%.?%d*)()", at)
        local number = digits and not digits:find("^0%d") and not digits:find("%.$") and tonumber(digits)
        if number and number >= least and number <= most then
            return number, after
        end
    end
end

local function whole_at(body, at)
    local digits, after = body:match("^([1-9]%d*)()", at)
    if digits and #digits < 10 then
        return tonumber(digits), after
    end
end

local function list_at(item_at)
    return function(body, at)
        local found = {}
        if body:byte(at) ~= 91 then
            return nil
        end
        repeat
            local value
            value, at = item_at(body, after_space(body, at + 1))
            if value == nil then
                return nil
            end
            found[#found + 1] = value
            at = after_space(body, at)
        until body:byte(at) ~= 44
        if body:byte(at) == 93 then
            return found, at + 1
        end
    end
end

local function either_at(one_at, other_at)
    return function(body, at)
        local value, after = one_at(body, at)
        if value ~= nil then
            return value, after
        end
        return other_at(body, at)
    end
end

local function object_at(fields)
    return function(body, at)
        local found = {}
        if body:byte(at) ~= 123 then
            return nil
        end
        repeat
            local name, value
            name, at = text_at(body, after_space(body, at + 1))
            if not name or not fields[name] or found[name] ~= nil then
                return nil
            end
            at = after_space(body, at)
            if body:byte(at) ~= 58 then
                return nil
            end
            value, at = fields[name](body, after_space(body, at + 1))
            if value == nil then
                return nil
            end
            found[name] = value
            at = after_space(body, at)
        until body:byte(at) ~= 44
        if body:byte(at) == 125 then
            return found, at + 1
        end
    end
end

local PLAIN = {
    chat = object_at({
        model = text_at,
        messages = list_at(object_at({ role = text_at, content = text_at })),
        stream = flag_at,
        stream_options = object_at({ include_usage = flag_at }),
        max_tokens = whole_at,
        max_completion_tokens = whole_at,
        temperature = number_at(0, 2),
        top_p = number_at(0, 1),
        presence_penalty = number_at(0, 2),
        frequency_penalty = number_at(0, 2),
        seed = whole_at,
        stop = either_at(text_at, list_at(text_at)),
    }),
    embedding = object_at({
        model = text_at,
        input = either_at(text_at, list_at(text_at)),
        encoding_format = text_at,
    }),
}
local PATHS = { ["/v1/chat/completions"] = "chat", ["/v1/embeddings"] = "embedding" }
local ROLES = { system = true, user = true, assistant = true }
local FORMATS = { float = true, base64 = true }

-- Whether LiteLLM would pass this chat request on unchanged, and limits do not apply to it.
local function is_plain_chat(request, limits)
    if not request.messages or request.max_tokens and request.max_completion_tokens then
        return false
    end
    if request.stream_options and request.stream ~= "true" then
        return false
    end
    for _, message in ipairs(request.messages) do
        if not ROLES[message.role] or not message.content then
            return false
        end
    end
    local tokens = request.max_tokens or request.max_completion_tokens
    if limits.default_tokens and not tokens or limits.tokens and (not tokens or tokens > limits.tokens) then
        return false
    end
    return #request.messages <= (limits.messages or #request.messages)
end

local function is_plain_embedding(request, limits)
    if not request.input or request.encoding_format and not FORMATS[request.encoding_format] then
        return false
    end
    local count = type(request.input) == "table" and #request.input or 1
    return request.input ~= "" and count <= (limits.messages or count)
end

-- The request if it is plain, else nil.
local function plain_request(body, kind, limits)
    local request, at = PLAIN[kind](body, after_space(body, 1))
    if not request or after_space(body, at) <= #body or not utf8.len(body) then
        return nil
    end
    for _, name in ipairs({ "text_kib", "message_kib" }) do
        if limits[name] and #body > limits[name] * 1024 then
            return nil
        end
    end
    local is_plain = kind == "chat" and is_plain_chat or is_plain_embedding
    return is_plain(request, limits) and request or nil
end

-- --- the conversation's name, as corral_gateway.py computes it

local function digest(txn, text)
    return txn.c:hex(txn.c:sha2(text, 256)):lower():sub(1, 32)
end

local function opening_of(messages)
    local parts = {}
    for _, message in ipairs(messages) do
        parts[#parts + 1] = message.role .. "\31" .. message.content
        if message.role == "user" then
            return table.concat(parts, "\30"):sub(1, OPENING_BYTES)
        end
    end
    return nil
end

local function conversation_of(txn, key, request)
    local session = txn:get_var("txn.session")
    if session and session ~= "" then
        return digest(txn, "session\n" .. key .. "\n" .. session:sub(1, OPENING_BYTES))
    end
    local opening = request.messages and opening_of(request.messages)
    return opening and digest(txn, "opening\n" .. key .. "\n" .. request.model .. "\n" .. opening)
end

-- --- permits

local function parsed(text)
    local found = {}
    for name, value in text:gmatch("(%w+)=(%S+)") do
        found[name] = value
    end
    return found
end

core.register_action("permit", { "http-res" }, function(txn)
    local values = txn.http:res_get_headers()["x-corral-permit"]
    txn.http:res_del_header("x-corral-permit")
    local key, model, asked = txn:get_var("txn.key"), txn:get_var("txn.model"), txn:get_var("txn.asked")
    if not values or not asked or not corral_fast[model] or asked <= (forgotten[key] or -SETTLE_MS) + SETTLE_MS then
        return
    end
    local said = parsed(values[0])
    local known = keys[key] or { minute = 0, count = 0 }
    known.parallel, known.rpm, known.seen = tonumber(said.parallel), tonumber(said.rpm), asked
    keys[key] = known
    permits[key .. "/" .. model] = {
        granted = asked, renewal = 0, expires = tonumber(said.expires), weight = said.weight or "1", name = said.name or "",
    }
end)

core.register_cli({ "corral", "forget" }, "corral forget HASH", function(applet, _, _, key)
    forgotten[key] = corral_now_ms()
    for name in pairs(permits) do
        if name:sub(1, #key) == key then
            permits[name] = nil
        end
    end
    keys[key] = nil
    applet:send("forgotten\n")
end)

-- Whether a request may use the permit; one request of each few seconds renews it at LiteLLM instead.
local function is_valid(permit, now)
    local age = now - permit.granted
    if permit.expires and now >= permit.expires * 1000 then
        return false
    end
    if not is_answering then
        return age < OUTAGE_MS
    end
    if age > RENEW_MS and now > permit.renewal then
        permit.renewal = now + RENEWAL_MS
        return false
    end
    return age < LIMIT_MS
end

-- What is counted of a key and a pool, by status; `limited` are refused by a limit of the key.
local function usage_of(key, pool, alias)
    local name = key .. "\t" .. pool.pool
    local fresh = { requests = 0, input = 0, output = 0, unknown = 0, limited = 0, statuses = {}, pool = pool.pool, kind = pool.kind, key = key }
    usage[name] = usage[name] or fresh
    usage[name].alias = alias
    return usage[name], name
end

-- Counts a request in either lane; the limit of the key that it would exceed.
local function limit_exceeded(txn, key, now)
    local known = keys[key]
    if not known then
        return nil
    end
    if known.parallel and (txn.f:sc1_conn_cur() or 1) > known.parallel then
        return "parallel"
    end
    if now - known.minute >= MINUTE_MS then
        known.minute, known.count = now, 0
    end
    if known.rpm and known.count >= known.rpm then
        return "rpm"
    end
    known.count = known.count + 1
end

local function keep_only_forwarded(txn)
    for name in pairs(txn.http:req_get_headers()) do
        if not FORWARDED[name] then
            txn.http:req_del_header(name)
        end
    end
end

-- The smaller one of each limit: of the pool, and of the frontend as `messages=100 tokens=1024`.
local function limits_of(pool, guard)
    local found = {}
    for name, limit in pairs(pool.limits) do
        found[name] = limit
    end
    for name, limit in pairs(parsed(guard or "")) do
        found[name] = math.min(tonumber(limit), found[name] or tonumber(limit))
    end
    return found
end

local function pass(txn, pool, permit, key, request, path)
    keep_only_forwarded(txn)
    txn.http:req_set_header("authorization", "Bearer " .. pool.key)
    txn.http:req_set_header("x-corral-consumer", txn:get_var("txn.consumer"))
    txn.http:req_set_header("x-corral-weight", permit.weight)
    local conversation = conversation_of(txn, key, request)
    if conversation and pool.kind == "chat" then
        txn.http:req_set_header("x-corral-session", conversation)
    end
    txn.http:req_set_path(pool.path .. path:sub(#"/v1" + 1))
    local known, name = usage_of(key, pool, permit.name)
    known.requests = known.requests + 1
    txn:set_var("txn.usage", name)
    txn:set_var("txn.fast", "yes")
end

core.register_action("fast", { "http-req" }, function(txn, guard)
    local key, model, path, now = txn:get_var("txn.key"), txn:get_var("txn.model"), txn.f:path(), corral_now_ms()
    txn:set_var("txn.asked", now)
    local over, pool, permit = limit_exceeded(txn, key, now), corral_fast[model], permits[key .. "/" .. model]
    if over then
        txn:set_var("txn.over", over)
        if pool and permit then
            local known = usage_of(key, pool, permit.name)
            known.limited = known.limited + 1
        end
        return
    end
    local body = txn.f:req_body()
    if not pool or not permit or PATHS[path] ~= pool.kind or #body ~= txn.f:req_body_size() then
        return
    end
    if (txn.f:req_hdr("content-type") or ""):lower():sub(1, #JSON) ~= JSON then
        return
    end
    if txn:get_var("txn.thinking") or not is_valid(permit, now) then
        return
    end
    local request = plain_request(body, pool.kind, limits_of(pool, guard))
    if request and request.model == model then
        pass(txn, pool, permit, key, request, path)
    end
end, 1)

-- Watches whether LiteLLM answers, and removes what is out of date.
core.register_task(function()
    while true do
        core.msleep(1000)
        local answer = core.httpclient():get({
            url = "http://" .. corral_litellm_address() .. ALIVE_PATH, headers = { host = { "litellm" } }, timeout = 3000,
        })
        is_answering = answer ~= nil and answer.status == 200
        local now = corral_now_ms()
        for name, permit in pairs(permits) do
            permits[name] = now - permit.granted < OUTAGE_MS and permit or nil
        end
        for key, known in pairs(keys) do
            keys[key] = now - known.seen < OUTAGE_MS and known or nil
        end
        for key, at in pairs(forgotten) do
            forgotten[key] = now - at < OUTAGE_MS and at or nil
        end
    end
end)

-- --- errors of servers, as corral_errors.py describes them

core.register_action("failed", { "http-res" }, function(txn)
    local said, status = txn.c:json_query(txn.f:res_body() or "", "$.error.message"), txn.f:status()
    if not said or said == "" then
        return
    end
    local tokens, most = said:match("%((%d+) tokens%)%D+(%d+)")
    local is_long = said:find("available context size", 1, true) or said:find("is too large to process", 1, true)
    txn:set_var("txn.code", "null")
    if is_long and tokens then
        said = "prompt is too long: " .. tokens .. " tokens > " .. most .. " maximum; this model's maximum context length is "
            .. most .. " tokens"
        status = 400
        txn:set_var("txn.code", '"context_length_exceeded"')
    end
    for _, wrong in ipairs({ "Failed to parse", "Unsupported tool type", "Unsupported param" }) do
        status = said:find(wrong, 1, true) and 400 or status
    end
    txn:set_var("txn.message", said)
    txn:set_var("txn.failed", status)
end)

-- --- times: as LiteLLM counts them, in the same buckets

local times, EDGES = {}, {}
for index, edge in ipairs(corral_buckets) do
    EDGES[index] = tonumber(edge)
end

-- Counts a time in the smallest bucket that has it; Prometheus' sums over smaller ones are made when it asks.
local function observe(kind, pool, milliseconds)
    local seconds, name = milliseconds / 1000, kind .. "\t" .. pool
    local known = times[name] or { kind = kind, pool = pool, sum = 0, count = 0, buckets = {} }
    times[name], known.sum, known.count = known, known.sum + seconds, known.count + 1
    for index, edge in ipairs(EDGES) do
        if seconds <= edge then
            known.buckets[index] = (known.buckets[index] or 0) + 1
            return
        end
    end
end

-- Counts an answer; a fetch, because HAProxy 2.6 has no actions of Lua after responses.
core.register_fetches("answered", function(txn)
    local known, status = usage[txn:get_var("txn.usage")], txn.f:status()
    if known then
        known.statuses[status] = (known.statuses[status] or 0) + 1
    end
    return ""
end)

-- --- usage: the token counts are at the end of an answer; those of embeddings may be at the beginning

local KEPT_BYTES = 2048
local Usage = { id = "usage of the fast lane", flags = filter.FLT_CFG_FL_HTX }
Usage.__index = Usage

function Usage:new()
    return setmetatable({ head = "", tail = "", is_timed = false }, Usage)
end

function Usage:start_analyze(txn, channel)
    if channel:is_resp() then
        filter.register_data_filter(self, channel)
    end
end

function Usage:http_payload(txn, message)
    if message.channel:is_resp() then
        local data = message:body() or ""
        if not self.is_timed then
            self.is_timed = true
            local known = usage[txn:get_var("txn.usage")]
            if known and txn:get_var("txn.streamed") then
                observe("first_token", known.pool, corral_now_ms() - txn:get_var("txn.asked"))
            end
        end
        if #self.head < KEPT_BYTES then
            self.head = (self.head .. data):sub(1, KEPT_BYTES)
        end
        self.tail = (self.tail .. data):sub(-KEPT_BYTES)
    end
end

local function count_in(text, name)
    return tonumber(text:match('"' .. name .. '"%s*:%s*(%d+)')) or 0
end

-- Prompt and answer tokens; llama-server's `timings` are in the last event of a stream without `usage`.
local function tokens_in(text)
    local found = text:match('.*"usage"%s*:%s*(%b{})')
    if found then
        return count_in(found, "prompt_tokens"), count_in(found, "completion_tokens")
    end
    found = text:match('.*"timings"%s*:%s*(%b{})')
    if found then
        return count_in(found, "prompt_n") + count_in(found, "cache_n"), count_in(found, "predicted_n")
    end
end

function Usage:http_end(txn, message)
    local known = usage[txn:get_var("txn.usage")]
    if not message.channel:is_resp() or not known or txn:get_var("txn.status") ~= 200 then
        return
    end
    observe("answer", known.pool, corral_now_ms() - txn:get_var("txn.asked"))
    local input, output = tokens_in(self.tail)
    if not input then
        input, output = tokens_in(self.head)
    end
    if not input then
        known.unknown = known.unknown + 1
        return
    end
    known.input, known.output = known.input + input, known.output + output
end

core.register_filter("usage", Usage, function(own) return own end)

local METRICS = {
    { "corral_fast_input_tokens_total", "Prompt tokens of the fast lane.", "input" },
    { "corral_fast_output_tokens_total", "Answer tokens of the fast lane.", "output" },
    { "corral_fast_uncounted_requests_total", "Answers of the fast lane without a count of tokens.", "unknown" },
    { "corral_fast_limited_requests_total", "Requests that a limit of their key refused before LiteLLM.", "limited" },
}
local STATUSES = "corral_fast_requests_total"

local function head_of(name, help, kind)
    return "# HELP " .. name .. " " .. help .. "\n# TYPE " .. name .. " " .. kind
end

local function labels_of(known)
    return "{api_key_alias=" .. corral_quoted(known.alias) .. ",hashed_api_key=" .. corral_quoted(known.key)
        .. ",pool=" .. corral_quoted(known.pool)
end

local function add_times(lines, kind, help)
    local name = "corral_fast_" .. kind .. "_seconds"
    lines[#lines + 1] = head_of(name, help, "histogram")
    for _, known in pairs(times) do
        local pool = "{pool=" .. corral_quoted(known.pool)
        if known.kind == kind then
            local count = 0
            for index, edge in ipairs(corral_buckets) do
                count = count + (known.buckets[index] or 0)
                lines[#lines + 1] = name .. "_bucket" .. pool .. ',le="' .. edge .. '"} ' .. count
            end
            lines[#lines + 1] = name .. "_bucket" .. pool .. ',le="+Inf"} ' .. known.count
            lines[#lines + 1] = name .. "_count" .. pool .. "} " .. known.count
            lines[#lines + 1] = name .. "_sum" .. pool .. "} " .. known.sum
        end
    end
end

local function answer(applet, kind, text)
    applet:set_status(200)
    applet:add_header("content-length", tostring(#text))
    applet:add_header("content-type", kind)
    applet:start_response()
    applet:send(text)
end

core.register_service("usage", "http", function(applet)
    local lines = { head_of(STATUSES, "Answers of the fast lane.", "counter") }
    for _, known in pairs(usage) do
        for status, count in pairs(known.statuses) do
            lines[#lines + 1] = STATUSES .. labels_of(known) .. ',status_code="' .. status .. '"} ' .. count
        end
    end
    for _, metric in ipairs(METRICS) do
        lines[#lines + 1] = head_of(metric[1], metric[2], "counter")
        for _, known in pairs(usage) do
            lines[#lines + 1] = metric[1] .. labels_of(known) .. "} " .. known[metric[3]]
        end
    end
    add_times(lines, "first_token", "Time until the first byte of a streamed answer.")
    add_times(lines, "answer", "Time of whole answers.")
    answer(applet, "text/plain; version=0.0.4", table.concat(lines, "\n") .. "\n")
end)

-- JSON: what has been added since it was last asked for.
core.register_service("take_usage", "http", function(applet)
    local rows = {}
    for _, known in pairs(usage) do
        local told, counts = known.told or { requests = 0, input = 0, output = 0 }, {}
        local is_new = false
        for name, was in pairs(told) do
            counts[#counts + 1] = '"' .. name .. '":' .. known[name] - was
            is_new = is_new or known[name] > was
        end
        known.told = { requests = known.requests, input = known.input, output = known.output }
        if is_new then
            local names = '{"key":' .. corral_quoted(known.key) .. ',"pool":' .. corral_quoted(known.pool)
            rows[#rows + 1] = names .. ',"kind":"' .. known.kind .. '",' .. table.concat(counts, ",") .. "}"
        end
    end
    answer(applet, "application/json", "[" .. table.concat(rows, ",") .. "]")
end)
