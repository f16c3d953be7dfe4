// The page about the farm: what /health, page.json and, with a key, /v1/models and /key/info say.
// Names come from the inventory and from servers: they enter the page as text, never as HTML.
"use strict";

const EVERY_MS = 5000;
const MOST_SQUARES = 32;
const MOST_NAMES = 6;
const BASE = new URL(".", location.href).href.replace(/\/$/, "");
const QUESTION = [{ role: "user", content: "Hello!" }];
// By kind of pool: path and body of an example.
const EXAMPLES = {
  chat: ["/v1/chat/completions", { messages: QUESTION }],
  embedding: ["/v1/embeddings", { input: "Hello!" }],
  rerank: ["/v1/rerank", { query: "a farm", documents: ["a barn", "a bank"] }],
  image: ["/v1/images/generations", { prompt: "a farm" }],
  speech: ["/v1/audio/speech", { input: "Hello!", voice: "alloy" }],
};
const farm = { name: "Farm", pools: [], links: [] };
let health = null; // the last answer
let opened = null; // models of the entered key

const byId = (id) => document.getElementById(id);

function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  made.className = classes;
  made.append(...children);
  return made;
}

function few(names) {
  const more = names.length - MOST_NAMES;
  return names.slice(0, MOST_NAMES).join(", ") + (more > 0 ? ` and ${more} more names` : "");
}

async function ask(path, key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store", credentials: "omit" });
  return { status: answer.status, body: await answer.json() };
}

// --- pools

const sum = (items, field) => items.reduce((total, item) => total + item[field], 0);

function squares(node) {
  const shown = element("span", "slots");
  shown.title = `${node.busy} of ${node.parallel} slots busy`;
  if (node.parallel > MOST_SQUARES) {
    shown.append(`${node.busy} / ${node.parallel}`);
  } else {
    for (let slot = 0; slot < node.parallel; slot += 1) {
      shown.append(element("i", slot < node.busy ? "busy" : ""));
    }
  }
  return shown;
}

function replica(node) {
  const latency = node.avgMs >= 50 ? ` · ${(node.avgMs / 1000).toFixed(1)} s on average` : "";
  const line = element("li", node.healthy ? "" : "down", element("span", "name", node.name), squares(node));
  line.append(element("span", "soft", `${node.models.join(", ")} · ${node.healthy ? "up" : "not available"}${latency}`));
  return line;
}

function load(pool, nodes) {
  const queue = (health.pools || []).find((item) => item.name === pool.queue);
  if (!queue) {
    return "answered elsewhere: its load is not known here";
  }
  const up = nodes.filter((node) => node.healthy);
  return `${sum(up, "busy")} of ${sum(up, "parallel")} slots busy · queue ${queue.queued} of ${queue.depth}`;
}

function card(pool) {
  const nodes = (health.nodes || []).filter((node) => pool.replicas.includes(node.name));
  const isClosed = opened && ![pool.name, ...pool.aliases].some((name) => opened.includes(name));
  const made = element("article", isClosed ? "pool closed" : "pool", element("h3", "", pool.name));
  const also = pool.aliases.length > 0 ? ` · also ${few(pool.aliases)}` : "";
  made.append(element("p", "soft", pool.kind + also + (isClosed ? " · your key does not open it" : "")));
  made.append(element("div", "", load(pool, nodes)), element("ul", "", ...nodes.map(replica)));
  return made;
}

function show() {
  const word = health ? health.status : "unknown";
  byId("status").textContent = word;
  byId("status").dataset.is = word;
  if (!health) {
    return;
  }
  byId("totals").textContent = health.nodes
    ? `${health.healthy} of ${health.total} replicas up · ${health.busy} of ${health.slots} slots busy · ${health.queued} waiting`
    : "Pools and their load are shown inside the farm's network only.";
  byId("pools").replaceChildren(...farm.pools.map(card));
}

async function refresh() {
  if (!document.hidden) {
    try {
      const { body } = await ask("health");
      health = body.status ? body : null;
      byId("pools").classList.remove("stale");
    } catch {
      byId("status").textContent = "not reachable";
      byId("status").dataset.is = "down";
      byId("pools").classList.add("stale");
      return;
    }
    show();
  }
}

// --- what a key may use

function limits(info) {
  const spent = info.max_budget === null ? null : `${info.spend.toFixed(2)} of ${info.max_budget} USD spent`;
  const found = [
    [info.rpm_limit, (limit) => `${limit} requests a minute`],
    [info.tpm_limit, (limit) => `${limit} tokens a minute`],
    [info.max_parallel_requests, (limit) => `${limit} requests at the same time`],
    [spent, (text) => text],
    [info.expires, (moment) => `valid until ${moment}`],
  ];
  return found.filter(([limit]) => limit !== null && limit !== undefined).map(([limit, say]) => say(limit));
}

async function showKey(event) {
  event.preventDefault();
  const key = byId("key").value.trim();
  const said = byId("key-answer");
  try {
    const models = await ask("v1/models", key);
    if (models.status !== 200) {
      throw new Error(models.body.error ? models.body.error.message : `status ${models.status}`);
    }
    opened = (models.body.data || []).map((model) => model.id);
    const pools = farm.pools.map((pool) => pool.name).filter((name) => opened.includes(name));
    said.replaceChildren(element("p", "", `It opens ${few([...new Set([...pools, ...opened])]) || "no pool"}.`));
    const { body } = await ask("key/info", key);
    if (body.info) {
      said.append(element("p", "", `Limits: ${limits(body.info).join(" · ") || "none of its own"}.`));
    }
  } catch (error) {
    opened = null;
    said.replaceChildren(element("p", "", error.message));
  }
  choices();
  show();
}

// --- how to use it

function choices() {
  const names = opened || farm.pools.map((pool) => pool.name);
  const before = byId("model").value;
  byId("model").replaceChildren(...names.map((name) => new Option(name)));
  byId("model").parentElement.hidden = names.length === 0;
  const chat = farm.pools.find((pool) => pool.kind === "chat" && names.includes(pool.name));
  byId("model").value = [before, chat && chat.name, names[0]].find((name) => names.includes(name)) || "";
  example();
}

function example() {
  const model = byId("model").value || "NAME OF A POOL";
  const pool = farm.pools.find((item) => [item.name, ...item.aliases].includes(model));
  const kind = pool ? pool.kind : "chat";
  if (kind === "transcription") {
    byId("example").textContent =
      `curl ${BASE}/v1/audio/transcriptions \\\n  -H "Authorization: Bearer $KEY" -F model='${model}' -F file=@speech.wav`;
    return;
  }
  const [path, body] = EXAMPLES[kind] || EXAMPLES.chat;
  byId("example").textContent =
    `curl ${BASE}${path} \\\n  -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\\n` +
    `  -d '${JSON.stringify({ model, ...body }).replaceAll("'", "\\u0027")}'`;
}

async function start() {
  byId("openai").textContent = `${BASE}/v1`;
  byId("anthropic").textContent = BASE;
  byId("key-form").addEventListener("submit", showKey);
  byId("model").addEventListener("change", example);
  document.addEventListener("visibilitychange", refresh);
  try {
    Object.assign(farm, (await ask("page.json")).body);
  } catch {
    byId("totals").textContent = "The farm does not answer. Reload the page later.";
  }
  document.title = byId("name").textContent = farm.name;
  byId("links").replaceChildren(
    ...farm.links.map(([name, url]) => Object.assign(element("a", "", name), { href: url, rel: "noreferrer" })),
  );
  if (farm.admin) {
    byId("admin").hidden = false;
    byId("admin-ssh").textContent = `ssh -L ${farm.admin}:127.0.0.1:${farm.admin} ${location.hostname}`;
    byId("admin-url").textContent = `http://127.0.0.1:${farm.admin}/ui`;
  }
  choices();
  await refresh();
  setInterval(refresh, EVERY_MS);
}

start();
