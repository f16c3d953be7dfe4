-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or haproxy/health.lua, then run: ./generate.py render

-- GET /health: the farm's state as JSON. It contains names, but no addresses.
--
-- All values are HAProxy's own statistics; no server is called. farm.lua, which is rendered, sets `corral_farm`.

local kept, kept_at = nil, -1
local before = {}        -- by group/replica: requests and errors of the workers that a reload has replaced

core.register_init(function()  -- not earlier: while HAProxy reads its configuration, it is in another folder
    local file = io.open(corral_figures_file)
    for line in file and file:lines() or function() end do
        local replica, requests, errors = line:match("^(%S+) (%d+) (%d+)$")
        before[replica or ""] = { tonumber(requests), tonumber(errors) }
    end
end)

function corral_quoted(text)
    return '"' .. tostring(text):gsub('[%c"\\]', function(letter)
        return string.format("\\u%04x", letter:byte())
    end) .. '"'
end

-- Lists are sequences of text; objects are lists of {name, value}, in this order.
local function json(value)
    if type(value) == "string" then
        return corral_quoted(value)
    end
    if type(value) ~= "table" then
        return tostring(value)
    end
    local parts = {}
    for _, item in ipairs(value) do
        parts[#parts + 1] = value.is_list and json(item) or corral_quoted(item[1]) .. ":" .. json(item[2])
    end
    local inside = table.concat(parts, ",")
    return value.is_list and "[" .. inside .. "]" or "{" .. inside .. "}"
end

local function number(text)
    return math.tointeger(tonumber(text) or 0) or 0
end

-- Requests to a replica, and those that failed there.
local function counts_of(group, name, figures)
    local earlier = before[group .. "/" .. name] or { 0, 0 }
    local errors = number(figures.hrsp_5xx) + number(figures.econ) + number(figures.eresp)
    return earlier[1] + number(figures.stot), earlier[2] + errors
end

local function node_of(pool, replica)
    local group = replica.group or pool.name
    local figures = core.backends[group].servers[replica.name]:get_stats()
    local requests, errors = counts_of(group, replica.name, figures)
    local is_healthy = figures.status:sub(1, 2) == "UP"
    return {
        is_healthy = is_healthy,
        busy = number(figures.scur),
        slots = replica.slots,
        requests = requests,
        errors = errors,
        json = {
            { "name", replica.name },
            { "pool", pool.pool },
            { "tier", replica.tier or pool.pool },
            { "models", replica.models or { replica.model, is_list = true } },
            { "healthy", is_healthy },
            { "status", figures.status },
            { "busy", number(figures.scur) },
            { "parallel", replica.slots },
            { "queued", number(figures.qcur) },
            { "requests", requests },
            { "errors", errors },
            { "avgMs", number(figures.ttime) },
            { "uptimeMs", is_healthy and number(figures.lastchg) * 1000 or 0 },
        },
    }
end

local function pool_of(pool, busy, slots)
    local figures = core.backends[pool.name]:get_stats()
    return {
        { "name", pool.is_lease and pool.pool or pool.name },
        { "busy", busy },
        { "slots", slots },
        { "queued", number(figures.qcur) },
        { "depth", pool.depth },
    }, number(figures.qcur)
end

local function state()
    local sum = { healthy = 0, total = 0, busy = 0, slots = 0, queued = 0, requests = 0, errors = 0 }
    local nodes, pools = { is_list = true }, { is_list = true }
    local spilling = 0  -- a request that may spill waits in several of these queues
    for _, pool in ipairs(corral_farm) do
        local busy, slots = 0, 0
        for _, replica in ipairs(pool.replicas) do
            local node = node_of(pool, replica)
            local node_slots = node.is_healthy and node.slots or 0
            busy, slots = busy + node.busy, slots + node_slots
            if not pool.is_lease then  -- there the replicas of other groups appear once more
                nodes[#nodes + 1] = node.json
                sum.total = sum.total + 1
                sum.healthy = sum.healthy + (node.is_healthy and 1 or 0)
                sum.requests, sum.errors = sum.requests + node.requests, sum.errors + node.errors
                sum.busy, sum.slots = sum.busy + node.busy, sum.slots + node_slots
            end
        end
        local described, queued = pool_of(pool, busy, slots)
        if pool.spills then
            spilling = math.max(spilling, queued)
        else
            sum.queued = sum.queued + queued
        end
        if not pool.is_leased then
            pools[#pools + 1] = described
        end
    end
    sum.queued = sum.queued + spilling
    local word = sum.healthy == sum.total and "ok" or sum.healthy > 0 and "degraded" or "down"
    return sum.healthy > 0 and 200 or 503, json({
        { "status", word },
        { "healthy", sum.healthy },
        { "total", sum.total },
        { "busy", sum.busy },
        { "slots", sum.slots },
        { "queued", sum.queued },
        { "requests", sum.requests },
        { "errors", sum.errors },
        { "uptimeMs", number(core.get_info()["Uptime_sec"]) * 1000 },
        { "pools", pools },
        { "nodes", nodes },
    }), word
end

local function refresh()
    local second = core.now().sec
    if second ~= kept_at then
        local status, text, word = state()
        kept = { status = status, text = text .. "\n", word = json({ { "status", word } }) .. "\n" }
        kept_at = second
    end
    return kept
end

local function send(applet, status, text)
    applet:set_status(status)
    applet:add_header("content-type", "application/json")
    applet:add_header("cache-control", "no-store")
    applet:add_header("content-length", tostring(#text))
    applet:start_response()
    applet:send(text)
end

core.register_service("health", "http", function(applet)
    local now = refresh()
    send(applet, now.status, now.text)
end)

-- For clients beyond the farm: nothing but the one word.
core.register_service("health_word", "http", function(applet)
    local now = refresh()
    send(applet, now.status, now.word)
end)

-- Before a reload: the counts, for the next worker.
core.register_cli({ "corral", "keep" }, "corral keep", function(applet)
    local file = assert(io.open(corral_figures_file, "w"))
    for _, pool in ipairs(corral_farm) do
        for _, replica in ipairs(pool.is_lease and {} or pool.replicas) do
            local node = node_of(pool, replica)
            file:write(pool.name, "/", replica.name, " ", node.requests, " ", node.errors, "\n")
        end
    end
    file:close()
    applet:send("kept\n")
end)
