-- Shares the slots and the queue of a pool between its consumers (API keys), in proportion to their weights.
--
-- In a backend, after `track-sc2`:  http-request lua.turn    (sets txn.offset, a request's place in HAProxy's queue, and
--                                                             txn.full for a request that finds no place there)
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
    groups[pool.name] = { depth = pool.depth, served = 0, origin = 0, consumers = {} }
end

local function in_flight(name, consumer)
    local found = core.proxies["Keys"].stktable:lookup(name .. "/" .. consumer)
    return found and found.conn_cur or 0
end

-- Requests in flight and weights of the other consumers; forgets those that have none.
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

-- Whether a request is within its consumer's share of a full queue and of the slots; `mine` includes this request.
local function is_within_share(txn, name, consumer, mine, weight)
    local group, queued = groups[name], txn.f:queue(name)
    if queued >= 2 * group.depth then
        return false
    end
    local theirs, weights = others_of(name, consumer)
    local places = mine - 1 + theirs - queued + group.depth
    return mine == 1 or mine * (weights + weight) <= places * weight
end

local function is_full(txn, name)
    return txn.f:nbsrv(name) > 0 and txn.f:be_conn_free(name) < 1 and txn.f:queue(name) >= groups[name].depth
end

local function weight_of(txn)
    local weight = math.tointeger(tonumber(txn:get_var("txn.weight"))) or 1
    return math.max(1, math.min(MOST_WEIGHT, weight))
end

local function tag_of(group, known, mine)
    local step = STEP_MS // known.weight
    local latest = group.served + mine * step  -- less than `next` if requests have left the queue unserved
    local tag = math.max(group.served, math.min(known.next, latest))
    known.next = tag + step
    return tag
end

-- Sets the tags to the clock where that changes no order; where it does, what waits already goes first.
local function wind(group, is_empty, now)
    if is_empty or math.abs(group.origin + group.served - now) > DRIFT_MS then
        group.origin = now - group.served
    end
end

core.register_action("turn", { "http-req" }, function(txn)
    if txn:get_var("txn.probe") then
        return
    end
    local name, consumer = txn.f:be_name(), txn:get_var("txn.consumer") or ""
    local group, mine, now = groups[name], txn.f:sc2_conn_cur(), corral_now_ms()
    local is_empty = txn.f:queue(name) == 0
    if is_empty then
        others_of(name, consumer)
    end
    local known = group.consumers[consumer] or { next = 0 }
    known.weight = weight_of(txn)
    group.consumers[consumer] = known
    if is_full(txn, name) and not is_within_share(txn, name, consumer, mine, known.weight) then
        txn:set_var("txn.full", "full")
        return
    end
    wind(group, is_empty, now)
    local tag = tag_of(group, known, mine)
    txn:set_var("txn.tag", tag)
    txn:set_var("txn.offset", group.origin + tag - now)
end)

core.register_action("served", { "http-res" }, function(txn)
    local group = groups[txn.f:be_name()]
    group.served = math.max(group.served, txn:get_var("txn.tag") or 0)
end)

core.register_fetches("room", function(txn, name)
    local consumer = txn:get_var("txn.consumer") or ""
    local known, mine = groups[name].consumers[consumer], in_flight(name, consumer) + 1
    local weight = known and known.weight or 1
    return is_within_share(txn, name, consumer, mine, weight) and "yes" or "no"
end)
