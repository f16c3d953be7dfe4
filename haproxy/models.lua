-- POST /models/load, /models/unload and /models/swap with {"model": POOL} (swap, load: and "instead_of": OTHER), for pools
-- that share a server. Unlike llama-server's own endpoints, they let answers in flight finish first, hold new requests, and
-- keep the previous model if the new one does not load.
--
-- The request needs the key of the servers on the gateway's host; HAProxy compares it before this script runs. If the client
-- disconnects, the change stops where it is. farm.lua, which is rendered, sets `corral_shared`.

local POLL_MS = 500
local HOLD_S = 5        -- renewed while needed, so that an interrupted change holds no requests
local UNLOAD_MS = 60000
local IN_MEMORY = { loaded = true, sleeping = true, loading = true }
local READY = { loaded = true, sleeping = true }

local function reply(applet, status, text)
    applet:set_status(status)
    applet:add_header("content-type", "application/json")
    applet:add_header("content-length", #text)
    applet:start_response()
    applet:send(text)
end

local KINDS = { [400] = "invalid_request_error", [401] = "authentication_error", [404] = "not_found_error" }

local function refuse(applet, status, words)
    local kind = KINDS[status] or "api_error"
    reply(applet, status, string.format('{"type":"error","error":{"type":"%s","message":%s,"param":null,"code":null}}', kind, corral_quoted(words)))
end

-- Every shared server with the pool's model, and the pool's entry there.
local function places_of(name)
    local found = {}
    for _, server in ipairs(corral_shared) do
        for _, member in ipairs(server.members) do
            if member.pool == name then
                found[#found + 1] = { server = server, member = member }
            end
        end
    end
    return found
end

local function figures(member)
    return core.backends[member.name].servers[member.server]:get_stats()
end

-- --- state of the server --------------------------------------------------------------------------------------------

local function ask(job, method, path, name)
    local base = job.server.via ~= "" and job.server.via  -- on another host: through HAProxy, which has the certificate
        or "http://" .. core.backends[job.member.name].servers[job.member.server]:get_addr()
    local headers = { ["authorization"] = { job.key }, ["content-type"] = { "application/json" } }
    local request = { url = base .. path, headers = headers }
    if name then
        request.body = string.format('{"model":%s}', corral_quoted(name))
    end
    local client = core.httpclient()
    local answer = method == "GET" and client:get(request) or method == "POST" and client:post(request)
    return answer.status, answer.body or ""
end

local function states(job)
    local status, body = ask(job, "GET", "/models")
    if status ~= 200 then
        return nil, status, body
    end
    local found, index = {}, 0
    while true do
        local at = string.format("$.data[%d].", index)
        local id = job.json:json_query(body, at .. "id")
        if not id then
            return found
        end
        found[id] = job.json:json_query(body, at .. "status.value")
        index = index + 1
    end
end

local function state_of(job, name)
    local found = states(job)
    return found and found[name] or "unknown"
end

-- --- changes --------------------------------------------------------------------------------------------------------

-- Waits for the condition, up to `limit_ms`; holds new requests to these pools meanwhile.
local function wait(job, limit_ms, is_so)
    local last = corral_now_ms() + limit_ms
    while true do
        for _, name in ipairs(job.held) do
            corral_hold(name, HOLD_S)
        end
        if is_so() then
            return true
        end
        if corral_now_ms() > last then
            return false
        end
        core.msleep(POLL_MS)
    end
end

local function unload(job, name)
    ask(job, "POST", "/models/unload", name)
    return wait(job, UNLOAD_MS, function()
        return not IN_MEMORY[state_of(job, name)]
    end)
end

-- Whether the model is in memory; false if its process ended or it timed out.
local function load(job, member)
    local status, body = ask(job, "POST", "/models/load", member.pool)
    local state = state_of(job, member.pool)
    if status ~= 200 and not IN_MEMORY[state] then  -- a request may have started the loading already
        return false, job.json:json_query(body, "$.error.message") or "it was refused"
    end
    wait(job, member.start_s * 1000, function()
        state = state_of(job, member.pool)
        return state ~= "loading"
    end)
    return READY[state] or false, state == "loading" and "it takes too long" or "its process ended"
end

local function is_idle(member)
    return function()
        local own = figures(member)
        return (own.scur or 0) + (own.qcur or 0) == 0 and (core.backends[member.name]:get_stats().qcur or 0) == 0
    end
end

local function member_of(server, name)
    for _, member in ipairs(server.members) do
        if member.pool == name then
            return member
        end
    end
end

-- The least recently used model in memory according to HAProxy; nil if there is room for another.
local function least_recent(job, found)
    local count, oldest, idle_s = 0, nil, -1
    for _, member in ipairs(job.server.members) do
        if member.pool ~= job.member.pool and IN_MEMORY[found[member.pool]] then
            count = count + 1
            local seconds = tonumber(figures(member).lastsess) or math.huge
            if seconds < 0 then
                seconds = math.huge
            end
            if seconds > idle_s then
                oldest, idle_s = member, seconds
            end
        end
    end
    return count >= job.server.loaded and oldest or nil
end

local function free(job, leaving)
    if not wait(job, leaving.answer_s * 1000, is_idle(leaving)) then
        return false, leaving.pool .. " still has requests after " .. leaving.answer_s .. " s; it stays in memory"
    end
    if not unload(job, leaving.pool) then
        return false, leaving.pool .. " does not go"
    end
    return true
end

local function bring(job, found, instead_of)
    local name, former = job.member.pool, nil
    if READY[found[name]] then
        return 200, "in memory already"
    end
    if instead_of then
        former = member_of(job.server, instead_of)
        if not former or not IN_MEMORY[found[instead_of]] then
            return 400, instead_of .. " is not in memory there"
        end
    else
        former = least_recent(job, found)
    end
    if former then
        local is_free, why = free(job, former)
        if not is_free then
            return 504, why
        end
    end
    local is_there, why = load(job, job.member)
    if is_there then
        return 200, former and "in memory instead of " .. former.pool or "in memory"
    end
    local words = name .. " does not load: " .. why
    if not former then
        return 502, words
    end
    unload(job, name)  -- half loaded it would be in the way
    local is_back = load(job, former)
    return 502, words .. "; " .. former.pool .. (is_back and " is in memory again, as before" or " does not load any more")
end

local function release(job)
    for _, name in ipairs(job.held) do
        corral_release(name)
    end
end

local function change(job, action, instead_of)
    local found, status, body = states(job)
    if not found then
        return status == 401 and 401 or 502, job.json:json_query(body, "$.error.message") or "the server does not answer"
    end
    for _, member in ipairs(job.server.members) do
        if action ~= "unload" or member.pool == job.member.pool then
            job.held[#job.held + 1] = member.name
        end
    end
    local code, words
    if action ~= "unload" then
        code, words = bring(job, found, instead_of)
    elseif not IN_MEMORY[found[job.member.pool]] then
        code, words = 200, "not in memory"
    else
        local is_free, why = free(job, job.member)
        code, words = is_free and 200 or 504, is_free and "no longer in memory" or why
    end
    release(job)
    return code, words
end

core.register_service("models", "http", function(applet)
    local action = applet.path:match("(%a+)$")
    local name, instead_of = applet:get_var("txn.model"), applet:get_var("txn.instead_of")
    if not name then
        return refuse(applet, 400, 'the body names no model: {"model": POOL}')
    end
    local places = places_of(name)
    if #places == 0 then
        return refuse(applet, 404, "no shared server has a pool named " .. name)
    end
    local key = applet.headers["authorization"]
    for _, place in ipairs(places) do
        local job = { server = place.server, member = place.member, key = key and key[0] or "", json = applet.c, held = {} }
        local code, words = change(job, action, instead_of)
        if code ~= 200 then
            return refuse(applet, code, words)
        end
        place.words = words
    end
    reply(applet, 200, string.format('{"model":%s,"message":%s}', corral_quoted(name), corral_quoted(places[1].words)))
end)
