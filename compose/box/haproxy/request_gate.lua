-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or haproxy/request_gate.lua, then run: ./generate.py render

-- Holds requests to a pool while `./generate.py up` changes its only server or all its servers, while a model of a shared
-- server is swapped, until it is the pool's turn there (fair_swapping.lua), and until a machine that sleeps is awake.
--
-- In a backend: http-request lua.hold DEPTH SECONDS; it sets txn.refused for requests that cannot wait any longer.
-- On the runtime API: `corral hold POOL SECONDS` and `corral release POOL`.

local POLL_MS = 50
local LEASE_PAUSE_MS = 10000
local LEFT_MS = 1000   -- Lua is not told about disconnects: drop waiters that have not polled for this time
local held_until = {}
local waiting = {}     -- by pool: for each waiting request, its arrival and its last poll
local number = 0

-- Also used by the scripts that are loaded after this one.
function corral_now_ms()
    local now = core.now()
    return now.sec * 1000 + now.usec // 1000
end

-- Holds new requests to the pool, for at most this number of seconds.
function corral_hold(name, seconds)
    held_until[name] = corral_now_ms() + seconds * 1000
end

function corral_release(name)
    held_until[name] = nil
end

-- Number of requests that wait here for the pool, and the arrival of the first one.
function corral_waiting(name)
    local count, first, now = 0, nil, corral_now_ms()
    for id, request in pairs(waiting[name] or {}) do
        if now - request.looked > LEFT_MS then
            waiting[name][id] = nil
        else
            count = count + 1
            first = math.min(first or request.came, request.came)
        end
    end
    return count, first
end

-- A server that was drained on purpose or is recovering: "MAINT", "DOWN 2/3"; not a failed one, which is "DOWN".
local function is_being_changed(backend)
    for _, server in pairs(backend.servers) do
        local status = server:get_stats().status
        if status == "MAINT" or status:sub(1, 10) == "MAINT (via" or status:sub(1, 5) == "DOWN " then
            return true
        end
    end
    return false
end

local function must_wait(txn, name)
    if (held_until[name] or 0) > corral_now_ms() then
        return true
    end
    if txn.f:nbsrv(name) == 0 then
        return is_being_changed(core.backends[name]) or (corral_sleepers or {})[name] ~= nil
    end
    return corral_waits_for_its_turn ~= nil and corral_waits_for_its_turn(txn, name)
end

core.register_action("hold", { "http-req" }, function(txn, depth, seconds)
    local name = txn.f:be_name()
    if not must_wait(txn, name) then
        return
    end
    if not corral_may_wait(txn, name, corral_waiting(name), tonumber(depth)) then
        txn:set_var("txn.refused", "too many")
        return
    end
    local came = corral_now_ms()
    local request, last = { came = came, looked = came }, came + tonumber(seconds) * 1000
    number = number + 1
    local id = number
    waiting[name] = waiting[name] or {}
    waiting[name][id] = request
    txn:set_var("txn.refused", "gone")  -- for clients that disconnect: HAProxy ends the action here and continues
    while request.looked < last and must_wait(txn, name) do
        core.msleep(POLL_MS)
        request.looked = corral_now_ms()
    end
    waiting[name][id] = nil
    if request.looked >= last then
        txn:set_var("txn.refused", "too long")
    else
        txn:unset_var("txn.refused")
    end
end, 2)

-- Names of sleeping machines for which requests wait; wake.py asks.
core.register_service("wanted", "http", function(applet)
    local names = {}
    for name, machines in pairs(corral_sleepers or {}) do
        if core.backends[name]:get_srv_act() == 0 and corral_waiting(name) > 0 then
            table.insert(names, table.concat(machines, "\n"))
        end
    end
    local text = table.concat(names, "\n")
    applet:set_status(200)
    applet:add_header("content-length", tostring(#text))
    applet:add_header("content-type", "text/plain")
    applet:start_response()
    applet:send(text)
end)

core.register_cli({ "corral", "hold" }, "corral hold POOL SECONDS", function(applet, _, _, name, seconds)
    corral_hold(name, tonumber(seconds))
    applet:send("held\n")
end)

core.register_cli({ "corral", "release" }, "corral release POOL", function(applet, _, _, name)
    corral_release(name)
    applet:send("released\n")
end)

-- Refuses a request after reading its body: while a client still sends a file, closing would hide the answer from it.
core.register_service("refuse_upload", "http", function(applet)
    repeat
        local part = applet:receive(65536)
    until not part or #part == 0
    local text = '{"type":"error","error":{"type":"rate_limit_error","message":"all slots are busy and the queue is full","param":null,"code":"rate_limit_exceeded"}}'
    applet:set_status(429)
    applet:add_header("content-type", "application/json")
    applet:add_header("content-length", tostring(#text))
    applet:add_header("retry-after", "5")
    applet:start_response()
    applet:send(text)
end)

-- The server behind the backends `Leases.<pool>`: it keeps a slot of theirs for as long as its client keeps the answer open.
core.register_service("lease", "http", function(applet)
    applet:set_status(200)
    applet:add_header("transfer-encoding", "chunked")
    applet:start_response()
    while true do
        applet:send("\n")
        core.msleep(LEASE_PAUSE_MS)
    end
end)
