-- Every operation on jobs, each one step for the store: KEYS is unused, ARGV has the operation's name and its arguments
-- as JSON.
--
--   job:<id>      a hash: all about one job; what clients sent is encrypted before it gets here
--   waiting       by id the time from which a worker may take the job
--   waiting:<model>  those of them that a poller may take
--   running       by id the end of the worker's lease; a later one takes the job over
--   callbacks     by id the time of the next attempt to deliver
--   events:<id>   a stream of what happened to a job, with the pieces of its answer
--   items:<id>    ids of the jobs of a batch
--   keys:<owner>  by id the arrival of a key's jobs
--   same:<...>    the id of the job with an idempotency key
--   unfinished    by owner the number of jobs that are not finished
--   totals        by what has happened how often
local a = cjson.decode(ARGV[2])
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local function get(id, field)
    return call('HGET', 'job:' .. id, field) or nil
end

local function say(id, event, ...)
    call('XADD', 'events:' .. id, '*', 'event', event, ...)
end

local function each_queue(id)
    local model = get(id, 'model')
    return ipairs(model and {'waiting', 'waiting:' .. model} or {'waiting'})
end

local function wait(id, at)
    for _, queue in each_queue(id) do
        call('ZADD', queue, at, id)
    end
end

local function leave(id)
    for _, queue in each_queue(id) do
        call('ZREM', queue, id)
    end
end

-- Keeps the record for some time, with those of a batch's jobs.
local function forget(id, keep_s)
    for _, kind in ipairs({'job:', 'events:', 'items:'}) do
        call('EXPIRE', kind .. id, keep_s)
    end
    for _, item in ipairs(call('LRANGE', 'items:' .. id, 0, -1)) do
        forget(item, keep_s)
    end
end

local function finish(id, status, field, value)
    local job, parent = 'job:' .. id, get(id, 'batch')
    leave(id)
    call('ZREM', 'running', id)
    call('HDEL', job, 'lease')
    call('HSET', job, 'status', status, 'finished_at', string.format('%.3f', now))
    if field then
        call('HSET', job, field, value)
    end
    if status == 'succeeded' then
        call('HDEL', job, 'request', 'key')
    end
    call('HINCRBY', 'totals', status, 1)
    call('HINCRBY', 'unfinished', get(id, 'owner'), -1)
    say(id, status)
    if get(id, 'callback') then
        call('HSET', job, 'callback_status', 'pending', 'callback_attempts', 0)
        call('ZADD', 'callbacks', now, id)
    elseif not parent then
        forget(id, tonumber(get(id, 'keep_s')))
    end
    if parent and call('HINCRBY', 'job:' .. parent, 'open', -1) == 0 and get(parent, 'status') == 'running' then
        finish(parent, 'succeeded')
    end
end

local function is_open(id)
    local status = get(id, 'status')
    return status == 'queued' or status == 'running'
end

local function has_lease()
    return get(a.id, 'lease') == a.lease
end

-- Whether so many more jobs of this key are too many.
local function is_full(count)
    return call('ZCARD', 'waiting') + count > a.depth
        or tonumber(call('HGET', 'unfinished', a.owner) or 0) + count > a.key_depth
end

local function enqueue(id)
    call('HSET', 'job:' .. id, 'status', 'queued', 'attempts', 0, 'expires_at',
        string.format('%.3f', now + tonumber(get(id, 'ttl_s'))))
    wait(id, now)
    call('HINCRBY', 'unfinished', get(id, 'owner'), 1)
    say(id, 'queued')
end

local operations = {}

-- The id of the job, new or that of the same request before; nothing when the queue is full.
function operations.submit()
    local known = a.same and call('GET', 'same:' .. a.same)
    if known and call('EXISTS', 'job:' .. known) == 1 then
        return {known, 'same'}
    end
    if is_full(#a.jobs) then
        return false
    end
    for number, fields in ipairs(a.jobs) do
        local job = 'job:' .. fields.id
        for name, value in pairs(fields) do
            call('HSET', job, name, value)
        end
        call('HSET', job, 'owner', a.owner, 'created_at', string.format('%.3f', now), 'keep_s', a.keep_s)
        if fields.open then
            call('HSET', job, 'status', 'running')
            call('HINCRBY', 'unfinished', a.owner, 1)
        else
            enqueue(fields.id)
        end
        if fields.batch then
            call('RPUSH', 'items:' .. fields.batch, fields.id)
        else
            call('ZADD', 'keys:' .. a.owner, now, fields.id)
        end
    end
    for _, id in ipairs(call('ZRANGE', 'keys:' .. a.owner, 0, 9)) do
        if call('EXISTS', 'job:' .. id) == 0 then
            call('ZREM', 'keys:' .. a.owner, id)
        end
    end
    if a.same then
        call('SET', 'same:' .. a.same, a.jobs[1].id, 'EX', a.same_s)
    end
    return {a.jobs[1].id, 'new'}
end

-- Jobs whose lease has ended wait again, at the place that they had.
local function take_back()
    for _, id in ipairs(call('ZRANGE', 'running', '-inf', now, 'BYSCORE', 'LIMIT', 0, 100)) do
        call('ZREM', 'running', id)
        if call('HDEL', 'job:' .. id, 'lease') == 1 then
            call('HSET', 'job:' .. id, 'status', 'queued')
            wait(id, get(id, 'created_at'))
        end
    end
end

-- The id of the job in these queues that is due and has waited longest, and its queue.
local function next_of(queues)
    local first, from, since = nil, nil, now
    for _, queue in ipairs(queues) do
        local found = call('ZRANGE', queue, '-inf', now, 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')
        if found[1] and tonumber(found[2]) <= since then
            first, from, since = found[1], queue, tonumber(found[2])
        end
    end
    return first, from
end

-- The next job that is due, with all its fields, now under this lease; with `models` only of those.
function operations.claim()
    local queues = a.models and {} or {'waiting'}
    for _, model in ipairs(a.models or {}) do
        queues[#queues + 1] = 'waiting:' .. model
    end
    take_back()
    while true do
        local id, queue = next_of(queues)
        if not id then
            return false
        end
        if call('EXISTS', 'job:' .. id) == 0 then
            call('ZREM', queue, id)
        elseif tonumber(get(id, 'expires_at')) <= now then
            finish(id, 'expired', 'error', '{"code":"expired","message":"the job did not start in time"}')
        elseif tonumber(get(id, 'attempts')) >= tonumber(get(id, 'most_attempts')) then
            finish(id, 'failed', 'error', '{"code":"worker_lost","message":"the worker was lost"}')
        else
            local attempts = call('HINCRBY', 'job:' .. id, 'attempts', 1)
            call('HSET', 'job:' .. id, 'status', 'running', 'lease', a.lease, 'pieces', 0, 'started_at',
                string.format('%.3f', now))
            leave(id)
            call('ZADD', 'running', now + a.lease_s, id)
            say(id, 'running', 'data', cjson.encode({attempt = attempts}))
            return call('HGETALL', 'job:' .. id)
        end
    end
end

-- Prolongs a lease, and adds a piece to the answer; nothing when the lease is lost.
function operations.beat()
    if not has_lease() then
        return false
    end
    call('ZADD', 'running', now + a.lease_s, a.id)
    if a.piece and a.number > tonumber(get(a.id, 'pieces')) then
        call('HSET', 'job:' .. a.id, 'pieces', a.number)
        say(a.id, 'piece', 'sealed', a.piece)
    end
    return 1
end

-- Ends a run; nothing when its lease is lost. With `again_s` the job waits so long and is run once more. A gateway that
-- has broken off a run often enough may do so because of that request.
function operations.finish()
    if not has_lease() then
        return false
    end
    if not a.again_s then
        finish(a.id, a.status, a.field, a.value)
        return 1
    end
    if a.is_uncounted or a.is_broken and call('HINCRBY', 'job:' .. a.id, 'breaks', 1) <= 10 then
        call('HINCRBY', 'job:' .. a.id, 'attempts', -1)
    end
    if tonumber(get(a.id, 'attempts')) >= tonumber(get(a.id, 'most_attempts')) then
        finish(a.id, 'failed', a.field, a.value)
        return 1
    end
    call('HDEL', 'job:' .. a.id, 'lease')
    call('HSET', 'job:' .. a.id, 'status', 'queued')
    call('ZREM', 'running', a.id)
    wait(a.id, now + a.again_s)
    call('HINCRBY', 'totals', 'again', 1)
    say(a.id, 'queued')
    return 1
end

function operations.cancel()
    if is_open(a.id) then
        finish(a.id, 'cancelled')
        for _, item in ipairs(call('LRANGE', 'items:' .. a.id, 0, -1)) do
            if is_open(item) then
                finish(item, 'cancelled')
            end
        end
    end
    return 1
end

-- Runs a job again that did not succeed, or delivers its callback again; nothing when the queue is full.
function operations.again()
    local status = get(a.id, 'status')
    local is_dead = get(a.id, 'callback_status') == 'dead'
    if is_open(a.id) or status == 'succeeded' and not is_dead or status ~= 'succeeded' and get(a.id, 'open') then
        return 'unfit'
    end
    if status ~= 'succeeded' and is_full(1) then
        return false
    end
    if is_dead then
        call('HSET', 'job:' .. a.id, 'callback_status', 'pending', 'callback_attempts', 0, 'finished_at',
            string.format('%.3f', now))
        call('ZADD', 'callbacks', now, a.id)
    end
    for _, kind in ipairs({'job:', 'events:', 'items:'}) do
        call('PERSIST', kind .. a.id)
    end
    if status ~= 'succeeded' then
        call('ZREM', 'callbacks', a.id)
        call('HDEL', 'job:' .. a.id, 'error', 'finished_at', 'callback_status', 'batch')
        call('DEL', 'events:' .. a.id)
        enqueue(a.id)
    end
    return 'queued'
end

-- The next job whose callback is due, with all its fields; no other worker gets it for some time.
function operations.callback()
    local id = call('ZRANGE', 'callbacks', '-inf', now, 'BYSCORE', 'LIMIT', 0, 1)[1]
    if not id then
        return false
    end
    call('ZADD', 'callbacks', now + a.lease_s, id)
    call('HINCRBY', 'job:' .. id, 'callback_attempts', 1)
    return call('HGETALL', 'job:' .. id)
end

function operations.called_back()
    if get(a.id, 'callback_status') ~= 'pending' then
        return false
    end
    local status = a.is_delivered and 'delivered' or 'dead'
    if not a.is_delivered and now - tonumber(get(a.id, 'finished_at')) < a.deliver_s then
        call('ZADD', 'callbacks', now + a.again_s, a.id)
        return 1
    end
    call('ZREM', 'callbacks', a.id)
    call('HSET', 'job:' .. a.id, 'callback_status', status)
    call('HINCRBY', 'totals', 'callback_' .. status, 1)
    forget(a.id, tonumber(get(a.id, 'keep_s')))
    return 1
end

-- How much there is of what, for metrics.
function operations.count()
    local oldest = call('ZRANGE', 'waiting', 0, 0, 'WITHSCORES')
    return {call('ZCARD', 'waiting'), call('ZCARD', 'running'), call('ZCARD', 'callbacks'),
        tostring(math.max(0, now - tonumber(oldest[2] or now))), call('HGETALL', 'totals')}
end

return operations[ARGV[1]]()
