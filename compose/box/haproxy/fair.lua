-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or haproxy/fair.lua, then run: ./generate.py render

-- Shares the slots and the queue of a pool between its consumers (API keys), in proportion to their weights.
--
-- In a backend, after `track-sc2`:  http-request lua.turn    (sets txn.offset, a request's place in HAProxy's queue, or
--                                                             txn.full if the queue has no place for it)
--                                   http-response lua.served
-- In the public frontend:           lua.room(POOL) is "yes" while this consumer may have a place in the queue of the pool.
--
-- The queue is ordered by start-time fair queueing: each request gets a tag, STEP_MS / weight after the previous one of its
-- consumer, but not before the tag of the request that was served last. The lowest tag is served first. An idle pool keeps
-- no memory: a consumer without requests in flight has neither credit nor debt.
-- A full queue has places beyond its depth, as many again, for consumers that hold less than their share.

local STEP_MS = 1000
local MOST_WEIGHT = 100
local DRIFT_MS = 250000  -- HAProxy compares places modulo 1049 s, so the tags must stay near the clock

local groups = {}        -- by name: tag of the request served last, clock time of tag 0, and the consumers with requests
for _, pool in ipairs(corral_farm) do
    groups[pool.name] = {
        depth = pool.depth, background_depth = pool.background_depth, served = 0, origin = 0, consumers = {},
    }
end

local function in_flight(name, consumer)
    local found = core.proxies["Keys"].stktable:lookup(name .. "/" .. consumer)
    return found and found.conn_cur or 0
end

-- Requests in flight and weights of the other consumers; removes those without requests.
local function others_of(name, consumer)
    local consumers, count, weights = groups[name].consumers, 0, 0
    for other, known in pairs(consumers) do
        if other ~= consumer then
            local theirs = in_flight(name, other)
            if theirs == 0 then
                consumers[other] = nil
            else
                count, weights = count + theirs, weights + known.weight
            end
        end
    end
    return count, weights
end

-- Whether a request is within its consumer's share of the slots and of a queue of this depth in which `queued` requests
-- wait; `mine` includes this request.
local function is_within_share(name, consumer, weight, mine, queued, depth)
    if queued >= 2 * depth then
        return false
    end
    local theirs, weights = others_of(name, consumer)
    local places = mine - 1 + theirs - queued + depth
    return mine == 1 or mine * (weights + weight) <= places * weight
end

-- The consumer of this request, with its current weight.
local function known_of(txn, name)
    local consumer, consumers = txn:get_var("txn.consumer") or "", groups[name].consumers
    local known, weight = consumers[consumer] or { next = 0 }, math.tointeger(tonumber(txn:get_var("txn.weight"))) or 1
    consumers[consumer], known.weight = known, math.max(1, math.min(MOST_WEIGHT, weight))
    return consumer, known
end

-- The consumer's requests in flight, including this one.
local function mine_of(txn)
    return txn.f:sc2_conn_cur() or 1
end

-- For request_gate.lua: whether this request may wait while `queued` others wait already.
function corral_may_wait(txn, name, queued, depth)
    local consumer, known = known_of(txn, name)
    return queued < depth or is_within_share(name, consumer, known.weight, mine_of(txn), queued, depth)
end

-- Places in the queue for this request; background requests may use half of them.
local function depth_of(txn, group)
    local is_background = group.background_depth > 0 and txn:get_var("txn.class") == "background"
    return is_background and group.background_depth or group.depth
end

local function tag_of(group, known, mine)
    local step = STEP_MS // known.weight
    local latest = group.served + mine * step  -- less than `next` if requests left the queue unserved
    local tag = math.max(group.served, math.min(known.next, latest))
    known.next = tag + step
    return tag
end

-- Aligns the tags with the clock if the queue is empty, or if they drift too far; then waiting requests go first.
local function wind(group, is_empty, now)
    if is_empty or math.abs(group.origin + group.served - now) > DRIFT_MS then
        group.origin = now - group.served
    end
end

core.register_action("turn", { "http-req" }, function(txn)
    if txn:get_var("txn.probe") then
        return
    end
    local name = txn.f:be_name()
    local group, queued, now = groups[name], txn.f:queue(name), corral_now_ms()
    local has_to_wait = txn.f:nbsrv(name) > 0 and txn.f:be_conn_free(name) < 1
    if has_to_wait and not corral_may_wait(txn, name, queued, depth_of(txn, group)) then
        txn:set_var("txn.full", "full")
        return
    end
    local consumer, known = known_of(txn, name)
    if queued == 0 then
        others_of(name, consumer)
    end
    wind(group, queued == 0, now)
    local tag = tag_of(group, known, mine_of(txn))
    txn:set_var("txn.tag", tag)
    txn:set_var("txn.offset", group.origin + tag - now)
end)

core.register_action("served", { "http-res" }, function(txn)
    local group = groups[txn.f:be_name()]
    group.served = math.max(group.served, txn:get_var("txn.tag") or 0)
end)

core.register_fetches("room", function(txn, name)
    local consumer = txn:get_var("txn.consumer") or ""
    local group, mine = groups[name], in_flight(name, consumer) + 1
    local known = group.consumers[consumer] or { weight = 1 }
    return is_within_share(name, consumer, known.weight, mine, txn.f:queue(name), group.depth) and "yes" or "no"
end)
