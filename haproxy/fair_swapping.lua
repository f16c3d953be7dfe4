-- Pools that share a server take turns. llama-server evicts a model only while it has no requests, so a pool with constant
-- requests would block all others until they time out.
--
-- request_gate.lua calls this: a request waits while other pools occupy all places, or while another pool has waited longer;
-- and an active pool yields to a pool that has waited for `turn_s`. farm.lua, which is rendered, sets `corral_shared`.

local PASSED_MS = 500  -- HAProxy counts a request shortly after its admission

local server_of = {}
local passed = {}
for _, server in ipairs(corral_shared) do
    for _, member in ipairs(server.members) do
        if member.takes_turns then
            server_of[member.name] = server
        end
    end
end

local function is_at_work(txn, member)
    return txn.f:srv_conn(member.name .. "/" .. member.server) > 0
        or corral_now_ms() - (passed[member.name] or 0) < PASSED_MS
end

-- Whether the pool has a place, how many others have one, and since when the longest-waiting pool without one waits.
local function look(txn, server, name)
    local is_mine, others, first = false, 0, nil
    for _, member in ipairs(server.members) do
        if is_at_work(txn, member) then
            is_mine = is_mine or member.name == name
            others = others + (member.name == name and 0 or 1)
        elseif member.name ~= name then
            local _, since = corral_waiting(member.name)
            first = since and math.min(first or since, since) or first
        end
    end
    return is_mine, others, first
end

local function must_wait(txn, server, name)
    local is_mine, others, first = look(txn, server, name)
    if is_mine then
        return first ~= nil and others + 1 >= server.loaded and corral_now_ms() - first >= server.turn_s * 1000
    end
    local _, since = corral_waiting(name)
    return others >= server.loaded or (first ~= nil and first < (since or math.huge))
end

function corral_waits_for_its_turn(txn, name)
    local server = server_of[name]
    if not server then
        return false
    end
    local waits = must_wait(txn, server, name)
    if not waits then
        passed[name] = corral_now_ms()
    end
    return waits
end
