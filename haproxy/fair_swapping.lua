-- Pools that share a server take turns. llama-server gives a model's place away only once nobody asks for that model, so a
-- pool that always has a request would keep all others out until they time out.
--
-- request_gate.lua asks: a request waits while others have all the places, or while another pool has waited for longer;
-- and a pool at work gives way to one that has waited for a turn's time. farm.lua, which is rendered, sets
-- `corral_shared`.

local PASSED_MS = 500  -- HAProxy counts a request a moment after it was let through

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

-- Whether the pool has a place, how many others have one, and since when the first of those that have none waits.
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
