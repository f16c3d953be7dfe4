-- Rendered by corral from the inventory "shared", host box; do not edit.
-- Change the inventory or litellm/hold.lua, then run: ./generate.py render

-- Lets requests wait while `./generate.py up` changes the only server of their pool, or all of them.
-- HAProxy itself queues only for servers that are full, and refuses at once when there is none.
--
-- In a backend: http-request lua.hold DEPTH SECONDS; it sets txn.refused for those that cannot wait any longer.
-- On the runtime API: `corral hold POOL SECONDS` and `corral release POOL`.

local POLL_MS = 50
local held_until = {}
local waiting = {}

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
    if (held_until[name] or 0) > core.now().sec then
        return true
    end
    return txn.f:nbsrv(name) == 0 and is_being_changed(core.backends[name])
end

core.register_action("hold", { "http-req" }, function(txn, depth, seconds)
    local name = txn.f:be_name()
    if not must_wait(txn, name) then
        return
    end
    if (waiting[name] or 0) >= tonumber(depth) then
        txn:set_var("txn.refused", "too many")
        return
    end
    local polls = tonumber(seconds) * 1000 / POLL_MS
    waiting[name] = (waiting[name] or 0) + 1
    while polls > 0 and must_wait(txn, name) do
        core.msleep(POLL_MS)
        polls = polls - 1
    end
    waiting[name] = waiting[name] - 1
    if polls <= 0 then
        txn:set_var("txn.refused", "too long")
    end
end, 2)

core.register_cli({ "corral", "hold" }, "corral hold POOL SECONDS", function(applet, _, _, name, seconds)
    held_until[name] = core.now().sec + tonumber(seconds)
    applet:send("held\n")
end)

core.register_cli({ "corral", "release" }, "corral release POOL", function(applet, _, _, name)
    held_until[name] = nil
    applet:send("released\n")
end)
