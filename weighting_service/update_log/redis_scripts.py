"""The Lua scripts of the Redis update log: each is one whole change, made with nothing in between.

Every script answers with a list: a word for what happened, then details. A script's first write is the one that can
fail (memory, disk, a foreign key), so that nothing is ever half done. Strings that come back as numbers are positions,
which stay below 2^53.
"""

CREATE_WEIGHTER = """
local names, heads, weighters, shared, records = unpack(KEYS)
local name, uid, record, tenants, format = unpack(ARGV)
if redis.call('HEXISTS', names, name) == 1 then return {'name_taken'} end
if redis.call('HEXISTS', heads, uid) == 1 then return {'uid_taken'} end
local order = redis.call('HINCRBY', records, 'order', 1)
redis.call('HSET', names, name, uid)
redis.call('HSET', weighters, uid, order .. ' ' .. record)
redis.call('HSET', shared, uid, tenants)
redis.call('HSET', heads, uid, 0)
redis.call('HSET', records, 'format', format)
redis.call('HINCRBY', records, 'version', 1)
return {'done'}
"""

PUT_WEIGHTER = """
local heads, shared, records = unpack(KEYS)
local uid, tenants = unpack(ARGV)
if redis.call('HEXISTS', heads, uid) == 0 then return {'no_weighter'} end
redis.call('HSET', shared, uid, tenants)
redis.call('HINCRBY', records, 'version', 1)
return {'done'}
"""

# KEYS after the eighth: all others of the weighter. The keys of taken update ids are one a job.
DELETE_WEIGHTER = """
local names, heads, weighters, shared, records, owners, seen, jobs = unpack(KEYS)
local uid, name, taken_prefix = unpack(ARGV)
if redis.call('HEXISTS', heads, uid) == 0 then return {'no_weighter'} end
for _, job in ipairs(redis.call('HKEYS', jobs)) do
    redis.call('HDEL', owners, job)
    redis.call('HDEL', seen, job)
    redis.call('UNLINK', taken_prefix .. job)
end
for i = 8, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('HDEL', names, name)
redis.call('HDEL', weighters, uid)
redis.call('HDEL', shared, uid)
redis.call('HDEL', heads, uid)
redis.call('HINCRBY', records, 'version', 1)
return {'done'}
"""

PUT_JOB = """
local heads, owners, jobs, open_jobs, profiles, records = unpack(KEYS)
local uid, job, record, is_open, profile = unpack(ARGV)
if redis.call('HEXISTS', heads, uid) == 0 then return {'no_weighter'} end
local owner = redis.call('HGET', owners, job)
if owner and owner ~= uid then return {'other_weighter'} end
local known = redis.call('HGET', jobs, job)
local order = known and string.match(known, '^%d+') or redis.call('HINCRBY', records, 'order', 1)
redis.call('HSET', jobs, job, order .. ' ' .. record)
if is_open == '1' then redis.call('ZADD', open_jobs, order, job) else redis.call('ZREM', open_jobs, job) end
redis.call('HSET', owners, job, uid)
if profile ~= '' then redis.call('HSET', profiles, job, profile) end
redis.call('HINCRBY', records, 'version', 1)
return {'done'}
"""

OPEN_JOBS = """
local heads, jobs, open_jobs = unpack(KEYS)
if redis.call('HEXISTS', heads, ARGV[1]) == 0 then return {'no_weighter'} end
local found = {}
for i, job in ipairs(redis.call('ZRANGE', open_jobs, 0, -1)) do found[i] = redis.call('HGET', jobs, job) end
return {'found', found}
"""

# ARGV: job, Unix milliseconds, job, Unix milliseconds, ...
TOUCH_JOBS = """
local owners, seen = unpack(KEYS)
for i = 1, #ARGV, 2 do
    local known = redis.call('HGET', seen, ARGV[i])
    if redis.call('HEXISTS', owners, ARGV[i]) == 1 and tonumber(known or 0) < tonumber(ARGV[i + 1]) then
        redis.call('HSET', seen, ARGV[i], ARGV[i + 1])
    end
end
return {'done'}
"""

# Gives an entry the next position: the part that updates and rollbacks share.
_ADD = """
local function add(entries, history, heads, uid, head, kind, payload, crc, digest)
    local position = string.format('%.0f', head + 1)
    local chain = redis.sha1hex((redis.call('HGET', history, 'chain') or '') .. digest)
    redis.call('XADD', entries, position .. '-0', 'kind', kind, 'payload', payload, 'crc', crc, 'chain', chain)
    redis.call('HSET', history, 'chain', chain)
    redis.call('HSET', heads, uid, position)
    return position
end
"""

# `taken` has position and digest of every update id; `taught` each job's highest step, of twenty digits so that texts
# compare like numbers, and its position. Both outlive trimming.
APPEND = (
    _ADD
    + """
local heads, jobs, taken, taught, history, entries = unpack(KEYS)
local uid, job, update_id, step, kind, payload, crc, digest = unpack(ARGV)
local head = redis.call('HGET', heads, uid)
if not head then return {'no_weighter'} end
if redis.call('HEXISTS', jobs, job) == 0 then return {'no_job'} end
local known = redis.call('HGET', taken, update_id)
if known then return {'taken', known} end
local position = add(entries, history, heads, uid, tonumber(head), kind, payload, crc, digest)
redis.call('HSET', taken, update_id, position .. ' ' .. digest)
local last = redis.call('HGET', taught, job)
if not last or string.sub(last, 1, 20) <= step then redis.call('HSET', taught, job, step .. ' ' .. position) end
return {'added', position}
"""
)

APPEND_ROLLBACK = (
    _ADD
    + """
local heads, history, entries = unpack(KEYS)
local uid, expected_head, kind, payload, crc, digest = unpack(ARGV)
local head = redis.call('HGET', heads, uid)
if not head then return {'no_weighter'} end
if expected_head ~= '' and expected_head ~= head then return {'other_head', head} end
return {'added', add(entries, history, heads, uid, tonumber(head), kind, payload, crc, digest)}
"""
)

# The chain at a position from the trimmed one to the head; empty where the entry has none, or is missing.
_CHAIN_AT = """
local function chain_at(entries, history, position)
    local found = redis.call('XRANGE', entries, position .. '-0', position .. '-0')
    if #found == 0 then
        local trimmed, chain = unpack(redis.call('HMGET', history, 'trimmed', 'trimmed_chain'))
        return trimmed == position and chain or ''
    end
    local fields = found[1][2]
    for i = 1, #fields, 2 do if fields[i] == 'chain' then return fields[i + 1] end end
    return ''
end
"""

# Entries until there are `limit`, or they take `most` bytes.
READ = (
    _CHAIN_AT
    + """
local heads, history, entries = unpack(KEYS)
local uid, after, limit, most = unpack(ARGV)
local head = redis.call('HGET', heads, uid)
if not head then return {'no_weighter'} end
local found, size = {}, 0
for position = after + 1, math.min(after + limit, head) do
    local id = string.format('%.0f-0', position)
    local entry = redis.call('XRANGE', entries, id, id)[1]
    if entry then
        found[#found + 1] = entry
        for _, field in ipairs(entry[2]) do size = size + #field end
        if size >= tonumber(most) then break end
    end
end
local cut = size >= tonumber(most) and 1 or 0
return {'found', head, redis.call('HGET', history, 'trimmed'), chain_at(entries, history, after), found, cut}
"""
)

TRIM = (
    _CHAIN_AT
    + """
local heads, history, entries = unpack(KEYS)
local uid, up_to, portion = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local head = tonumber(redis.call('HGET', heads, uid))
if not head then return {'no_weighter'} end
local trimmed = tonumber(redis.call('HGET', history, 'trimmed') or 0)
local last = math.min(up_to, head)
local to = math.min(last, trimmed + portion)
if to <= trimmed then return {'done'} end
local position = string.format('%.0f', to)
local chain = chain_at(entries, history, position)
redis.call('XTRIM', entries, 'MINID', string.format('%.0f-0', to + 1))
redis.call('HSET', history, 'trimmed', position, 'trimmed_chain', chain)
return {to < last and 'more' or 'done'}
"""
)

VOUCH = """
local heads, vouched = unpack(KEYS)
local uid, place, checksum = unpack(ARGV)
if redis.call('HEXISTS', heads, uid) == 0 then return {'no_weighter'} end
redis.call('HSETNX', vouched, place, checksum)
return {'holds', redis.call('HGET', vouched, place)}
"""

# KEYS after the first: what an import has written so far.
ABANDON_IMPORT = """
local importing = KEYS[1]
if redis.call('GET', importing) ~= ARGV[1] then return {'not_ours'} end
for i = 1, #KEYS do redis.call('UNLINK', KEYS[i]) end
return {'done'}
"""

# Makes a weighter known whose entries, jobs and update ids are there already. ARGV after the seventh: its jobs and when
# each was last heard of.
FINISH_IMPORT = """
local names, heads, weighters, shared, records, owners, seen, importing = unpack(KEYS)
local name, uid, record, tenants, head, format, importer = unpack(ARGV)
if redis.call('GET', importing) ~= importer then return {'not_ours'} end
if redis.call('HEXISTS', names, name) == 1 then return {'name_taken'} end
if redis.call('HEXISTS', heads, uid) == 1 then return {'uid_taken'} end
for i = 8, #ARGV, 2 do
    if redis.call('HEXISTS', owners, ARGV[i]) == 1 then return {'job_taken', ARGV[i]} end
end
local order = redis.call('HINCRBY', records, 'order', 1)
for i = 8, #ARGV, 2 do
    redis.call('HSET', owners, ARGV[i], uid)
    if ARGV[i + 1] ~= '0' then redis.call('HSET', seen, ARGV[i], ARGV[i + 1]) end
end
redis.call('HSET', names, name, uid)
redis.call('HSET', weighters, uid, order .. ' ' .. record)
redis.call('HSET', shared, uid, tenants)
redis.call('HSET', heads, uid, head)
redis.call('HSET', records, 'format', format)
redis.call('HINCRBY', records, 'version', 1)
redis.call('UNLINK', importing)
return {'done'}
"""
