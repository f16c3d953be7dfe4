-- Rendered by corral from the inventory "farm", host box; do not edit.
-- Change the inventory or haproxy/credentials.lua, then run: ./generate.py render

-- Asks LiteLLM once whether it knows a credential, before HAProxy reads the body of the request. HAProxy stores the
-- answer in its table `Credentials`; LiteLLM still checks every request.
--
-- In a frontend: http-request lua.verify; it sets txn.verified to "yes", "no" (with LiteLLM's message in txn.refusal), or
-- "unsure" if LiteLLM does not answer.

local LIMIT_MS = 5000
local UNKNOWN = 401

-- The address of a worker of LiteLLM that is up; of any when none is, or when HAProxy does not look.
function corral_litellm_address()
    local address
    for _, server in pairs(core.backends["Gateway"].servers) do
        if not address or server:get_stats().status:find("^UP") then
            address = server:get_addr()
        end
    end
    return address
end

core.register_action("verify", { "http-req" }, function(txn)
    local answer = core.httpclient():get({
        url = "http://" .. corral_litellm_address() .. "/v1/models",
        headers = { ["authorization"] = { "Bearer " .. txn:get_var("txn.credential") }, ["host"] = { "litellm" } },
        timeout = LIMIT_MS,
    })
    local status = answer and answer.status or 0
    if status == UNKNOWN then
        txn:set_var("txn.refusal", answer.body or "")
        txn:set_var("txn.verified", "no")
    elseif status == 0 or status >= 500 then
        txn:set_var("txn.verified", "unsure")
    else
        txn:set_var("txn.verified", "yes")
    end
end)
