-- Loads a renewed certificate within seconds, without a restart: a renewal only has to replace the file.
-- `setenv` in haproxy.cfg sets its path.

local PERIOD_MS = 5000

local path = os.getenv("CORRAL_CERTIFICATE")
local known

local function read()
    local file = io.open(path, "r")
    if not file then
        return nil
    end
    local text = file:read("a")
    file:close()
    return text
end

-- HAProxy rejects an incomplete file or one with the wrong key; the old certificate stays in use.
local function take_over(text)
    local is_taken, problem = pcall(CertCache.set, { filename = path, crt = text })
    if is_taken then
        core.Info("the renewed certificate is in use")
    else
        core.Warning("the certificate has changed and cannot be used: " .. tostring(problem))
    end
end

core.register_task(function()
    known = read()
    while true do
        core.msleep(PERIOD_MS)
        local text = read()
        if text and text ~= known then
            known = text
            take_over(text)
        end
    end
end)
