-- Rendered by corral from the inventory "vllm", host box; do not edit.
-- Change the inventory or litellm/blame.lua, then run: ./generate.py render

-- Decides whether a replica or a request is to blame for an answer of 500 or more, and leaves the replica out if it is.
-- HAProxy's own count of errors would take one healthy replica after the other out for requests that no replica can
-- answer. Connections that fail are not judged here: `observe layer4` does that.
--
-- In a backend:  http-request lua.avoid            (a conversation that just failed somewhere is free to go elsewhere)
--                http-after-response set-var(txn.blamed) lua.blame

local LIMIT = 3        -- conversations that fail on a replica, one after the other
local REMEMBERED = 4096

local streaks = {}     -- by pool/replica: how many such failures in a row, and since when
local answered = {}    -- by pool/replica: when it last answered well
local failed = {}      -- by pool and conversation: the replica on which it failed last
local remembered = 0

local function is_error(txn, status)
    if status < 500 or status == 501 or status == 505 then
        return false
    end
    -- HAProxy's own 503 says that nobody could take the request, which is nobody's fault.
    return status ~= 503 or txn:get_var("txn.answered") ~= nil
end

local function has_sibling_that_answered(pool, name, since)
    for other, server in pairs(core.backends[pool].servers) do
        if other ~= name and (answered[pool .. "/" .. other] or 0) >= since and server:get_stats().status == "UP" then
            return true
        end
    end
    return false
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

-- True if this failure is one more conversation that fails on this replica, and for all we know on this one only.
local function counts(pool, name, conversation)
    local before = conversation and failed[conversation]
    if not before then
        return true
    end
    local streak = streaks[pool .. "/" .. before]
    if before ~= name and streak then
        streak.length = math.max(0, streak.length - 1)  -- it fails elsewhere, too: the request is to blame
    end
    return false
end

core.register_action("avoid", { "http-req" }, function(txn)
    local key = txn:get_var("txn.key")
    if key and failed[txn.f:be_name() .. "/" .. key] then
        txn:unset_var("txn.sid")
    end
end)

local function succeeded(replica, conversation)
    streaks[replica] = nil
    answered[replica] = corral_now_ms()
    if conversation then
        forget(conversation)
    end
end

-- Whether the replica is left out for this failure.
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
    if streak.length < LIMIT or not has_sibling_that_answered(pool, name, streak.since) then
        return false
    end
    streak.length = LIMIT - 1  -- when it comes back, its next failure is enough
    core.backends[pool].servers[name]:check_force_down()
    core.Warning(replica .. " is left out: it fails where others answer")
    return true
end

-- A fetch and no action, because only a fetch may look at the answers that HAProxy gives for a broken server.
core.register_fetches("blame", function(txn)
    local pool, name, status = txn.f:be_name(), txn.f:srv_name(), txn.f:status()
    if not name or name == "" then
        return false
    end
    local key = txn:get_var("txn.key")
    local conversation = key and pool .. "/" .. key
    if is_error(txn, status) then
        return has_failed(pool, name, conversation)
    end
    if status < 400 then
        succeeded(pool .. "/" .. name, conversation)
    end
    return false
end)
