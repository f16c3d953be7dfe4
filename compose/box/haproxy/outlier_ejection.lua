-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or haproxy/outlier_ejection.lua, then run: ./generate.py render

-- Decides whether a replica or a request caused an answer of 500 or more, and ejects the replica if it did. HAProxy's own
-- error count would eject one healthy replica after the other for requests that no replica can answer. `observe layer4`
-- handles failed connections.
--
-- Failures of client requests only make a replica suspect. The proof is a probe: a minimal request of the kit, sent through
-- this HAProxy. A replica is ejected only if it fails the probe and another replica answers the same probe. Without failed
-- requests there are no probes.
--
-- In a backend:  http-request lua.settle          (waits briefly while a replica of the pool is being probed)
--                http-request lua.avoid           (lets a conversation leave a replica on which it has just failed)
--                http-after-response set-var(txn.blamed) lua.blame

local LIMIT = 2          -- consecutive conversations that fail on a replica
local REMEMBERED = 4096
local SHARE = 20         -- a replica that stays is not probed again for this multiple of its probe's duration …
local LEAST_PAUSE_MS, LONGEST_PAUSE_MS = 100, 10000  -- … within these bounds, so that probes use little of its time
local SETTLE_MS = 100
local POLL_MS = 5

local streaks = {}       -- by pool/replica: number of consecutive failures, and their start
local answered = {}      -- by pool/replica: time of its last successful answer
local failed = {}        -- by pool and conversation: the replica of its last failure
local remembered = 0
local probing = {}       -- by pool/replica: whether it is being probed
local settling = {}      -- by pool: start of the current probe
local paused = {}        -- by pool/replica: time until which it is not probed again
local answerable = {}    -- pools with a replica that has answered a probe successfully
local credentials = {}   -- by pool: authorization header of a successful request
local verdicts = {}      -- by number of the probe: false until a replica has answered, then its name and result
local probes = 0

local function is_error(txn, status)
    if status < 500 or status == 501 or status == 505 then
        return false
    end
    -- HAProxy's own 503 means that no server could take the request; no server has failed.
    return status ~= 503 or txn:get_var("txn.answered") ~= nil
end

local function sibling_that_answered(pool, name, since)
    for other, server in pairs(core.backends[pool].servers) do
        if other ~= name and (answered[pool .. "/" .. other] or 0) >= since and server:get_stats().status == "UP" then
            return other
        end
    end
    return nil
end

local function remember(conversation, name)
    if remembered >= REMEMBERED then
        failed, remembered = {}, 0
    end
    if not failed[conversation] then
        remembered = remembered + 1
    end
    failed[conversation] = name
end

local function forget(conversation)
    if failed[conversation] then
        failed[conversation], remembered = nil, remembered - 1
    end
end

-- Whether this failure counts against the replica: a conversation that has not failed elsewhere.
local function counts(pool, name, conversation)
    local before = conversation and failed[conversation]
    if not before then
        return true
    end
    local streak = streaks[pool .. "/" .. before]
    if before ~= name and streak then
        streak.length = math.max(0, streak.length - 1)  -- it fails elsewhere too: the request is the cause
    end
    return false
end

core.register_action("avoid", { "http-req" }, function(txn)
    local key = txn:get_var("txn.key")
    if key and failed[txn.f:be_name() .. "/" .. key] then
        txn:unset_var("txn.sid")
    end
end)

-- --- the probe --------------------------------------------------------------------------------------------------------

local function farm_of(pool)
    for _, known in ipairs(corral_farm) do
        if known.name == pool then
            return known
        end
    end
end

-- "well", "error", or nil if the answer proves nothing.
local function answer_of(pool, name)
    local known, headers = farm_of(pool), { ["content-type"] = { "application/json" } }
    probes = probes + 1
    local id = tostring(probes)
    headers["x-corral-probe"], verdicts[id] = { id }, false
    if credentials[pool] then
        headers["authorization"] = { credentials[pool] }
    end
    local url = "http://" .. corral_entry .. "/" .. pool .. "/" .. name .. known.probe_path
    core.httpclient():post({ url = url, headers = headers, body = known.probe_body })
    local verdict = verdicts[id]
    verdicts[id] = nil
    return verdict and verdict.name == name and verdict.answer or nil
end

local function is_answerable(pool, sibling)
    answerable[pool] = answerable[pool] or answer_of(pool, sibling) == "well"
    return answerable[pool]
end

local function probe(pool, name, sibling)
    local replica, began, answer = pool .. "/" .. name, corral_now_ms(), answer_of(pool, name)
    local took = corral_now_ms() - began
    if answer == "error" and is_answerable(pool, sibling) then
        streaks[replica] = { length = LIMIT - 1, since = corral_now_ms() }  -- after its return, one failure is enough
        core.backends[pool].servers[name]:check_force_down()
        core.Warning(replica .. " is left out: it fails where others answer")
        return
    end
    answerable[pool] = answerable[pool] or answer == "well"
    local pause = math.max(LEAST_PAUSE_MS, math.min(LONGEST_PAUSE_MS, SHARE * took))
    streaks[replica], paused[replica] = nil, corral_now_ms() + pause
end

local function start_probe(pool, name, sibling)
    local replica = pool .. "/" .. name
    probing[replica], settling[pool] = true, corral_now_ms()
    core.register_task(function()
        local is_done, problem = pcall(probe, pool, name, sibling)
        probing[replica], settling[pool] = nil, nil
        if not is_done then
            core.Warning(replica .. " could not be probed: " .. tostring(problem))
        end
    end)
end

core.register_action("settle", { "http-req" }, function(txn)
    local pool = txn.f:be_name()
    if txn:get_var("txn.probe") then
        return
    end
    while settling[pool] and corral_now_ms() - settling[pool] < SETTLE_MS do
        core.msleep(POLL_MS)
    end
end)

-- --- answers ----------------------------------------------------------------------------------------------------------

local function succeeded(pool, replica, conversation, credential)
    streaks[replica] = nil
    answered[replica] = corral_now_ms()
    credentials[pool] = credential
    if conversation then
        forget(conversation)
    end
end

-- Whether the replica is being probed because of this failure.
local function has_failed(pool, name, conversation)
    local replica = pool .. "/" .. name
    local is_counted = counts(pool, name, conversation)
    if conversation then
        remember(conversation, name)
    end
    if not is_counted then
        return false
    end
    local streak = streaks[replica] or { length = 0, since = corral_now_ms() }
    streak.length = streak.length + 1
    streaks[replica] = streak
    if streak.length < LIMIT or probing[replica] or corral_now_ms() < (paused[replica] or 0) then
        return false
    end
    local sibling = sibling_that_answered(pool, name, streak.since)
    if sibling then
        start_probe(pool, name, sibling)
    end
    return sibling ~= nil
end

-- A fetch, not an action: only fetches can read the answers that HAProxy generates for a failed server.
core.register_fetches("blame", function(txn)
    local pool, name, status = txn.f:be_name(), txn.f:srv_name(), txn.f:status()
    if not name or name == "" then
        return false
    end
    local probe_id = txn:get_var("txn.probe")
    if probe_id then
        if verdicts[probe_id] == false then
            local answer = is_error(txn, status) and "error" or status < 400 and "well" or nil
            verdicts[probe_id] = { name = name, answer = answer }
        end
        return false
    end
    local key = txn:get_var("txn.key")
    local conversation = key and pool .. "/" .. key
    if is_error(txn, status) then
        return has_failed(pool, name, conversation)
    end
    if status < 400 then
        succeeded(pool, pool .. "/" .. name, conversation, txn:get_var("txn.authorization"))
    end
    return false
end)
