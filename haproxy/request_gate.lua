-- Lets requests wait in front of a pool while `./generate.py up` changes the only server of it, or all of them; while a
-- model of a shared server is swapped; and until it is the pool's turn there (fair_swapping.lua).
--
-- In a backend: http-request lua.hold DEPTH SECONDS; it sets txn.refused for those that cannot wait any longer.
-- On the runtime API: `corral hold POOL SECONDS` and `corral release POOL`.

local POLL_MS = 50
local LEFT_MS = 1000   -- Lua is not told about disconnects: drop waiters that have not polled for so long
local held_until = {}
local waiting = {}     -- by pool: when each request that waits came and last looked
local number = 0

-- For the scripts that are loaded after this one, too.
function corral_now_ms()
    local now = core.now()
    return now.sec * 1000 + now.usec // 1000
end

-- New requests to the pool wait from now on, at the longest for so many seconds.
function corral_hold(name, seconds)
    held_until[name] = corral_now_ms() + seconds * 1000
end

function corral_release(name)
    held_until[name] = nil
end

-- How many requests wait here for the pool, and since when the first of them does.
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

-- Out of rotation on purpose, or on its way back: "MAINT", "DOWN 2/3"; never a server that just died, which is "DOWN".
local function is_being_changed(backend)
    for _, server in pairs(backend.servers) do
        local status = server:get_stats().status
        if status == "MAINT" or status:sub(1, 5) == "DOWN " then
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
        return is_being_changed(core.backends[name])
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
    txn:set_var("txn.refused", "gone")  -- what holds for a client that leaves: HAProxy ends this here and goes on
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

core.register_cli({ "corral", "hold" }, "corral hold POOL SECONDS", function(applet, _, _, name, seconds)
    corral_hold(name, tonumber(seconds))
    applet:send("held\n")
end)

core.register_cli({ "corral", "release" }, "corral release POOL", function(applet, _, _, name)
    corral_release(name)
    applet:send("released\n")
end)
