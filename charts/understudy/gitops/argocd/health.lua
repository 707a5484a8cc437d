-- Health of every kind of understudy.dev for Argo CD, from the conditions that kstatus reads.
-- Argo CD runs this without Lua's string library.
local hs = { status = "Progressing", message = "Not seen by its controller yet" }

local meta = obj.metadata or {}
local status = obj.status
if status == nil then
  return hs
end

-- A status that was written for another spec says nothing about this one.
if status.observedGeneration ~= nil and meta.generation ~= nil
    and status.observedGeneration ~= meta.generation then
  return hs
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is(kind, value)
  return conditions[kind] ~= nil and conditions[kind].status == value
end

local function tell(kind)
  local condition = conditions[kind]
  local message = condition.message
  if message == nil or message == "" then
    message = condition.reason or ""
  end
  if status.phase ~= nil then
    message = status.phase .. ": " .. message
  end
  return message
end

if is("Stalled", "True") then
  hs.status = "Degraded"
  hs.message = tell("Stalled")
  return hs
end

-- Not ready, not stuck, and nobody works on it: it waits for somebody.
if status.phase == "AwaitingCutover" or (is("Ready", "False") and is("Reconciling", "False")) then
  hs.status = "Suspended"
  hs.message = tell("Ready")
  return hs
end

if is("Reconciling", "True") then
  hs.message = tell("Reconciling")
  return hs
end

if is("Ready", "True") then
  hs.status = "Healthy"
  hs.message = tell("Ready")
elseif conditions.Ready ~= nil then
  hs.message = tell("Ready")
end
return hs
