// The status page: draws what /api/v1/events tells. Everything that comes from there is put in as text, never as markup.
"use strict";

const WINDOW_MS = 15 * 60 * 1000;
/** Rows show a node in full; with more nodes than this, those that serve are tiles. */
const MOST_ROWS = 24;
/** The rows of nodes that get nothing when the others are tiles, and the problems that are spelled out. */
const MOST_OUT = 12;
const MOST_PROBLEMS = 8;
/** The purges that are shown before somebody asks for more. */
const FEW_PURGES = 12;

const byId = (id) => document.getElementById(id);
const known = { fleet: null, hello: null, samples: [], purges: [], elsewhere: [], silent: [] };
/** What the server's clock is ahead of this one: no two machines' times are compared. */
let ahead = 0;
const now = () => Date.now() + ahead;

/** An element with attributes, and children that are elements or texts. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Writes a text only where it changed, so that a screen reader is not told the same thing every second. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keeps the children of `parent` in step with `items`: elements stay, and with them focus and what is folded out. */
function keyed(parent, items, keyOf, create, update) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = before.get(key);
    before.delete(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  before.forEach((child) => child.remove());
}

// Numbers in words.

const plural = (count, one, many) => `${count} ${count === 1 ? one : many}`;

function rate(value) {
  if (value >= 10000) return `${(value / 1000).toFixed(1)}k/s`;
  return value >= 10 || value === 0 ? `${Math.round(value)}/s` : `${value.toFixed(1)}/s`;
}

function time(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 9950) return `${Math.round(ms / 1000)} s`;
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 10 || ms === 0 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = share * 100;
  const exact = value > 0 && value < 10 || value > 90 && value < 100;
  return `${exact ? Math.min(99.9, Math.max(0.1, value)).toFixed(1) : Math.round(value)} %`;
}

function lasting(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds / 60) % 60} min`;
  return plural(Math.floor(seconds / 86400), "day", "days");
}

const clockTime = (at) => new Date(at).toLocaleTimeString([], { hour12: false });
const since = (node) => (node.since ? `for ${lasting(now() - Date.parse(node.since))}` : "");

// Nodes.

const STATES = {
  serving: ["serves", "good"], "at-limit": ["at its limit", "warn"], starting: ["slow start", "good"], "used-though-down": ["down, but used", "warn"],
  unchecked: ["not checked yet", "warn"], down: ["down", "bad"], ejected: ["ejected", "bad"], behind: ["behind", "bad"], untrusted: ["keeps purged pages", "bad"],
  drained: ["drained", "quiet"], unresolved: ["no address", "bad"],
};
const wordsOf = (node) => (STATES[node.state] || [node.state, "warn"])[0];
const toneOf = (node) => (STATES[node.state] || ["", "warn"])[1];
const roleName = (role) => (role === "varnish" ? "Varnish" : "web node");
const byUrgency = (a, b) => urgency(b) - urgency(a) || a.id.localeCompare(b.id, "en", { numeric: true });

function urgency(node) {
  return { behind: 6, untrusted: 5, down: 4, ejected: 4, unresolved: 3, unchecked: 2, "used-though-down": 2, drained: 1 }[node.state] || 0;
}

function badge(node) {
  return make("span", { class: "badge", "data-tone": toneOf(node) }, wordsOf(node));
}

// The verdict: what is wrong, in the first line; then each thing with its reason and what to do.

/** What is wrong beside single nodes. */
function troubles(fleet) {
  return fleet.problems.map((problem) => ({
    key: problem.what, who: problem.what, tone: problem.severity === "critical" ? "bad" : "warn", words: "",
    since: problem.at ? `${lasting(now() - Date.parse(problem.at))} ago` : "", why: problem.why,
    todo: `${problem.advice} (alert ${problem.alert})`,
  }));
}

function headline(fleet, out, wrong) {
  const of = (role) => fleet.nodes.filter((node) => node.role === role);
  const [varnish, web] = [of("varnish"), of("web")];
  const serving = (nodes) => nodes.filter((node) => node.gets_traffic).length;
  if (!fleet.nodes.length) return ["bad", "No node is known yet."];
  if (varnish.length && !serving(varnish) && !serving(web)) return ["bad", "No node gets traffic. The shop is down."];
  if (varnish.length && !serving(varnish)) {
    const then = { bypass: "readers go to the web nodes, past the caches", serve: "readers may get old pages", refuse: "readers are refused" };
    return ["bad", `No Varnish gets traffic: ${then[known.hello?.when_all_behind] || "see edge.when_all_behind"}.`];
  }
  if (web.length && !serving(web)) return ["bad", "No web node gets traffic: what no cache has fails."];
  const urgent = out.filter((node) => node.state !== "drained");
  if (urgent.length) {
    const part = (nodes, name) => {
      const count = nodes.filter((node) => urgent.includes(node)).length;
      return count ? `${count} of ${nodes.length} ${name}` : "";
    };
    const parts = [part(varnish, "Varnish"), part(web, web.length === 1 ? "web node" : "web nodes")].filter(Boolean);
    return ["bad", `${parts.join(" and ")} ${urgent.length === 1 ? "gets" : "get"} no traffic.`];
  }
  if (wrong.length) return ["warn", `All nodes serve, but look at ${wrong[0].who.replace(/^[A-Z]/, (letter) => letter.toLowerCase())}.`];
  if (fleet.nodes.some((node) => node.state === "used-though-down")) return ["warn", "Too few nodes are well. Those that are not are used all the same."];
  const drained = out.length ? `, ${out.length} drained` : "";
  return ["good", `All is well: ${serving(varnish)} Varnish and ${plural(serving(web), "web node", "web nodes")} serve${drained}.`];
}

function drawVerdict(fleet) {
  const out = fleet.nodes.filter((node) => !node.gets_traffic).sort(byUrgency);
  const odd = fleet.nodes.filter((node) => node.state === "used-though-down").sort(byUrgency);
  const wrong = troubles(fleet);
  const [tone, text] = headline(fleet, out, wrong);
  byId("verdict").dataset.state = tone;
  write(byId("headline"), text);
  const urgent = out.filter((node) => node.state !== "drained");
  document.title = urgent.length || wrong.length ? `${urgent.length + wrong.length} wrong – clearcoat` : "clearcoat";
  const ofNode = (node) => ({
    key: `${node.role} ${node.id}`, who: node.id, tone: toneOf(node), words: wordsOf(node), badgeTone: toneOf(node),
    since: since(node), why: node.why, todo: node.advice, role: roleName(node.role),
  });
  const shown = [...wrong, ...[...out, ...odd].map(ofNode)];
  const items = shown.slice(0, MOST_PROBLEMS);
  if (shown.length > MOST_PROBLEMS) items.push({ key: "more", tone: "quiet", who: `and ${shown.length - MOST_PROBLEMS} more, below`, why: "", todo: "" });
  keyed(byId("problems"), items, (item) => item.key, () => {
    const line = make("p", {}, make("span", { class: "who" }), make("span", { class: "badge" }), make("span", { class: "since" }));
    return make("li", {}, line, make("p", { class: "why" }), make("p", { class: "todo" }));
  }, (row, item) => {
    row.dataset.tone = item.tone;
    write(row.querySelector(".who"), item.who);
    const mark = row.querySelector(".badge");
    mark.dataset.tone = item.badgeTone || item.tone;
    write(mark, item.words || "");
    mark.hidden = !item.words;
    write(row.querySelector(".since"), item.since || "");
    for (const part of ["why", "todo"]) {
      write(row.querySelector(`.${part}`), item[part] || "");
      row.querySelector(`.${part}`).hidden = !item[part];
    }
  });
}

// The fleet as a picture.

function drawSelf(fleet) {
  write(byId("now-journal"), fleet.spooled ? `${fleet.journal}, ${fleet.spooled} to upload` : `in ${fleet.journal === "disk" ? "a file" : fleet.journal}`);
  write(byId("now-head"), String(fleet.head));
  const waiting = (fleet.queues || []).filter((queue) => queue.waiting > 0);
  byId("queue-row").hidden = !waiting.length;
  write(byId("now-queue"), waiting.map((queue) => `${queue.waiting} of ${queue.max_queue} at the ${queue.listener}`).join(", "));
  byId("registry-row").hidden = !fleet.registry;
  if (fleet.registry) write(byId("now-registry"), `${fleet.registry.kind}${fleet.registry.connected ? "" : ", silent"}`);
  const replicas = fleet.replicas || [];
  keyed(byId("replicas"), replicas.length > 1 ? replicas : [], (replica) => replica.id, () => make("li", {}, make("b"), " ", make("span", { class: "badge" })), (row, replica) => {
    write(row.firstElementChild, replica.id);
    const [words, tone] = replica.self ? ["this one", "quiet"] : replica.confirmed ? ["has every purge", "good"] : ["lacks purges", "warn"];
    write(row.lastElementChild, words);
    row.lastElementChild.dataset.tone = tone;
  });
}

function figures(node) {
  const isVarnish = node.role === "varnish";
  const idle = !node.recent.requests_per_second;
  return isVarnish
    ? [idle ? "–" : percent(node.recent.hit_rate), node.lag === undefined ? "–" : String(node.lag)]
    : [time(node.recent.mean_ms), String(node.inflight)];
}

function weightOf(node) {
  if (node.registered_weight !== undefined) return `${node.weight} by an operator, registered with ${node.registered_weight}`;
  return node.weight === 1 ? "" : String(node.weight);
}

function factsOf(node) {
  const cache = node.role === "varnish" && node.lag !== undefined;
  return [
    ["state", [wordsOf(node), since(node)].filter(Boolean).join(", ")],
    ["why", node.why],
    ["what to do", node.advice],
    ["address", node.address],
    ["requests", `${rate(node.recent.requests_per_second)}, ${node.inflight}${node.max_requests ? ` of ${node.max_requests}` : ""} under way`],
    ["mean time", node.recent.mean_ms === null ? "" : time(node.recent.mean_ms)],
    ["5xx", node.recent.errors ? percent(node.recent.errors) : ""],
    ["hit rate", cache ? percent(node.recent.hit_rate) : ""],
    ["purges", cache ? (node.lag ? `lacks ${node.lag}, the oldest for ${lasting((node.lag_seconds || 0) * 1000)}` : "has every purge") : ""],
    ["last error", cache ? node.delivery_error : ""],
    ["trial", cache ? node.trial_finding : ""],
    ["VCL", cache && node.vcl ? node.vcl.problem || `${node.vcl.in_use || "unknown"} (${node.vcl.state})` : ""],
    ["seal", cache ? (node.seals ? "purges of tags need not wait for it" : node.seals_not || "") : ""],
    ["weight", weightOf(node)],
    ["zone", node.zone],
    ["labels", Object.entries(node.labels || {}).map(([name, value]) => `${name}=${value}`).join(", ")],
    ["epoch", node.epoch],
    ["source", `${node.source}${node.retained ? ", not registered any more" : ""}`],
  ].filter(([, text]) => text);
}

function drawFacts(list, node) {
  keyed(list, factsOf(node).flatMap(([name, text]) => [[name, "dt", name], [name, "dd", text]]), ([name, tag]) => `${tag} ${name}`, ([, tag]) => make(tag), (element, [, , text]) => write(element, text));
}

const orderOf = (node) => (node.drained_since ? "Resume" : "Drain");

/** The button with which an operator drains or resumes a node, if operators may. */
function drawOrder(line, node) {
  const button = line.firstElementChild || line.appendChild(make("button", { type: "button" }));
  line.hidden = !known.hello?.may_purge || node.state === "unresolved";
  write(button, `${orderOf(node)}…`);
  button.setAttribute("aria-label", `${orderOf(node)} ${node.id}`);
  button.onclick = () => askOrder(node);
}

function newRow() {
  const share = make("span", { class: "share" }, make("span", { class: "bar" }, make("i")), make("span"));
  const summary = make("summary", {}, make("span", { class: "name" }, make("b"), make("span", { class: "badge" })), share, make("span", { class: "number" }), make("span", { class: "number" }));
  const details = make("details", {}, summary, make("dl", { class: "facts" }), make("p", { class: "order" }));
  details.addEventListener("toggle", () => known.fleet && drawFleet(known.fleet));
  return details;
}

function drawRow(row, node) {
  row.dataset.tone = toneOf(node);
  write(row.querySelector("b"), node.id);
  const mark = row.querySelector(".badge");
  write(mark, wordsOf(node));
  mark.dataset.tone = toneOf(node);
  row.querySelector(".bar i").style.width = `${Math.round(node.recent.part * 100)}%`;
  write(row.querySelector(".share > span:last-child"), node.gets_traffic || node.recent.part ? percent(node.recent.part) : "none");
  const [first, second] = row.querySelectorAll(".number");
  const [a, b] = figures(node);
  write(first, a);
  write(second, b);
  second.classList.toggle("lacks", node.role === "varnish" && node.lag > 0 && !node.gets_traffic);
  const words = node.role === "varnish" ? `hit rate ${a}, lacks ${plural(node.lag || 0, "purge", "purges")}` : `mean time ${a}, ${b} requests now`;
  row.querySelector("summary").setAttribute("aria-label", `${node.id}: ${wordsOf(node)}, ${percent(node.recent.part)} of the traffic, ${words}`);
  if (row.open) drawFacts(row.querySelector(".facts"), node);
  drawOrder(row.querySelector(".order"), node);
}

const picked = {};

function drawPool(role, nodes) {
  const stage = document.querySelector(`.nodes[data-role="${role}"]`);
  const sorted = [...nodes].sort(byUrgency);
  const isMany = nodes.length > MOST_ROWS;
  const rows = isMany ? sorted.filter((node) => !node.gets_traffic).slice(0, MOST_OUT) : [...nodes].sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
  const tiles = isMany ? sorted.filter((node) => !rows.includes(node)) : [];
  stage.querySelector(".heads").hidden = !rows.length;
  keyed(stage.querySelector(".rows"), rows, (node) => node.id, newRow, drawRow);
  keyed(stage.querySelector(".tiles"), tiles, (node) => node.id, (node) => {
    const tile = make("button", { class: "tile", type: "button" });
    tile.addEventListener("click", () => {
      picked[role] = picked[role] === node.id ? null : node.id;
      drawFleet(known.fleet);
    });
    return tile;
  }, (tile, node) => {
    tile.dataset.tone = toneOf(node);
    tile.title = `${node.id}: ${wordsOf(node)}`;
    tile.setAttribute("aria-label", `${node.id}: ${wordsOf(node)}`);
    tile.setAttribute("aria-pressed", String(picked[role] === node.id));
  });
  const chosen = tiles.find((node) => node.id === picked[role]);
  keyed(stage.querySelector(".picked"), chosen ? [chosen] : [], (node) => node.id, () => make("div", {}, make("p", { class: "name" }), make("dl", { class: "facts" }), make("p", { class: "order" })), (panel, node) => {
    write(panel.firstElementChild, node.id);
    drawFacts(panel.querySelector(".facts"), node);
    drawOrder(panel.querySelector(".order"), node);
  });
  const serving = nodes.filter((node) => node.gets_traffic).length;
  write(byId(`count-${role}`), nodes.length ? `${serving} of ${nodes.length} serve` : "none");
}

function drawFleet(fleet) {
  drawVerdict(fleet);
  drawSelf(fleet);
  for (const role of ["varnish", "web"]) drawPool(role, fleet.nodes.filter((node) => node.role === role));
}

// The plots.

const SVG = "http://www.w3.org/2000/svg";
const PLOTS = [
  { id: "chart-requests", name: "Requests", lines: [{ of: "requests_per_second" }], show: rate, least: 1 },
  { id: "chart-latency", name: "Latency", lines: [{ of: "p50_ms", name: "median" }, { of: "p99_ms", name: "p99" }], show: time, least: 1 },
  { id: "chart-errors", name: "Errors (5xx)", lines: [{ of: "errors" }], show: percent, least: 0.01 },
  { id: "chart-hits", name: "Hit rate", lines: [{ of: "hit_rate" }], show: percent, least: 1 },
];

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function prepare(plot) {
  const figure = byId(plot.id);
  plot.value = make("span", { class: "value" });
  plot.svg = shape("svg", { viewBox: "0 0 900 100", preserveAspectRatio: "none", role: "img" });
  plot.area = shape("path", { class: "area" });
  plot.paths = plot.lines.map((_, index) => shape("path", { class: index ? "second" : "first" }));
  plot.at = shape("line", { class: "at", y1: 0, y2: 100, visibility: "hidden" });
  plot.svg.append(shape("line", { x1: 0, x2: 900, y1: 0, y2: 0 }), shape("line", { x1: 0, x2: 900, y1: 100, y2: 100 }), plot.area, ...plot.paths, plot.at);
  plot.top = make("span", { class: "top" });
  plot.foot = make("span", {}, "now");
  const names = plot.lines.filter((line) => line.name).map((line, index) => make("span", { class: index ? "second-name" : "first-name" }, line.name));
  figure.append(make("figcaption", {}, make("span", {}, plot.name), plot.value), make("div", { class: "plot" }, plot.svg, plot.top),
    make("div", { class: "axis" }, make("span", {}, "15 min ago"), ...names, plot.foot));
  plot.svg.addEventListener("pointermove", (event) => {
    const box = plot.svg.getBoundingClientRect();
    plot.pointed = (event.clientX - box.left) / box.width;
    drawPlot(plot);
  });
  plot.svg.addEventListener("pointerleave", () => {
    plot.pointed = undefined;
    drawPlot(plot);
  });
}

/** A bound above the values that is easy to read. */
function bound(most, least) {
  const value = Math.max(most, least);
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((step) => step * unit).find((step) => step >= value * 0.999) || value;
}

function drawPlot(plot) {
  const end = now();
  const begin = end - WINDOW_MS;
  const samples = known.samples.filter((sample) => sample.at >= begin);
  const all = samples.flatMap((sample) => plot.lines.map((line) => sample[line.of])).filter((value) => value !== null);
  const isShare = plot.show === percent;
  const most = Math.min(bound(Math.max(0, ...all), plot.least), isShare ? 1 : Infinity);
  const step = (known.hello?.step_seconds || 5) * 1000;
  const x = (sample) => ((sample.at - begin) / WINDOW_MS) * 900;
  const y = (value) => 100 - (value / most) * 100;
  plot.lines.forEach((line, index) => {
    let path = "";
    let last = null;
    let first = null;
    for (const sample of samples) {
      const value = sample[line.of];
      if (value === null) { last = null; continue; }
      const isOn = last && sample.at - last.at < 3 * step;
      path += `${isOn ? "L" : "M"}${x(sample).toFixed(1)} ${y(value).toFixed(1)}`;
      first = first || sample;
      last = sample;
    }
    plot.paths[index].setAttribute("d", path);
    const isWhole = (path.match(/M/g) || []).length === 1 && last;
    if (plot.lines.length === 1) plot.area.setAttribute("d", isWhole ? `${path}L${x(last).toFixed(1)} 100L${x(first).toFixed(1)} 100Z` : "");
  });
  const chosen = plot.pointed === undefined ? samples.at(-1)
    : samples.reduce((near, sample) => (Math.abs(x(sample) - plot.pointed * 900) < Math.abs(x(near || sample) - plot.pointed * 900) ? sample : near), samples[0]);
  const texts = plot.lines.map((line) => (chosen ? plot.show(chosen[line.of]) : "–"));
  write(plot.value, texts.join(" / "));
  write(plot.top, plot.show(most));
  write(plot.foot, plot.pointed === undefined || !chosen ? "now" : clockTime(chosen.at));
  plot.at.setAttribute("visibility", plot.pointed === undefined || !chosen ? "hidden" : "visible");
  if (chosen) ["x1", "x2"].forEach((side) => plot.at.setAttribute(side, x(chosen).toFixed(1)));
  const spoken = plot.lines.map((line, index) => `${line.name ? `${line.name}: ` : ""}${texts[index]}`).join(", ");
  plot.svg.setAttribute("aria-label", `${plot.name} in the last 15 minutes. Now ${spoken}; the scale ends at ${plot.show(most)}.`);
}

function drawNow() {
  const sample = known.samples.at(-1);
  if (sample) {
    write(byId("now-requests"), rate(sample.requests_per_second));
    write(byId("now-errors"), percent(sample.errors));
    write(byId("now-p50"), time(sample.p50_ms));
    write(byId("now-p99"), time(sample.p99_ms));
  }
  PLOTS.forEach(drawPlot);
}

// Purges.

const RESULTS = {
  applied: ["done", "good"], pending: ["done", "good"], fenced: ["done, some out", "warn"],
  refused_by_node: ["refused by a node", "bad"], untaken: ["not confirmed", "bad"],
};

function whatOf(purge) {
  const shown = purge.sample.slice(0, 3).map((text) => make("code", {}, text));
  const more = Math.max(0, (purge.tags || purge.sample.length) - shown.length);
  if (more) shown.push(make("span", { class: "quiet" }, `and ${more} more `));
  if (purge.wide.includes("everything")) return [make("span", { class: "wide" }, "everything")];
  if (purge.wide.length) shown.push(make("span", { class: "wide" }, "every page of a kind"));
  return shown;
}

function progressOf(purge) {
  // Of another clearcoat only what it said at its answer is known here.
  if (purge.by) return `${purge.applied} had it when ${purge.by} answered`;
  if (!purge.of) return "no Varnish is there";
  if (purge.has < purge.of) {
    const rest = purge.of - purge.has - purge.missing.length;
    return `${purge.has} of ${purge.of}; not yet ${purge.missing.join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  }
  const after = purge.all_after_ms === null ? "" : ` after ${time(purge.all_after_ms)}`;
  const bans = purge.bans === null ? "" : `, ${plural(purge.bans, "ban", "bans")}${purge.together > 1 ? ` for ${purge.together} purges` : ""}`;
  return `${purge.of === 1 ? "yes" : `all ${purge.of}`}${after}${bans}`;
}

function newPurge(purge) {
  const parts = ["at", "what", "from", "badge", "has"].map((name) => make("span", { class: name }));
  const row = make("details", {}, make("summary", {}, ...parts), make("div", { class: "more" }));
  row.querySelector(".at").textContent = clockTime(purge.time);
  row.querySelector(".what").append(...whatOf(purge));
  row.querySelector(".from").textContent = purge.by ? `${purge.source} to ${purge.by}` : purge.source;
  row.addEventListener("toggle", () => row.open && fillPurge(row, purge));
  return row;
}

async function fillPurge(row, { position, by }) {
  const more = row.querySelector(".more");
  if (by) {
    more.replaceChildren(make("p", { class: "quiet" }, `It was sent to ${by}: the page of that clearcoat shows each node.`));
    return;
  }
  try {
    const answer = await fetch(`api/v1/purges/${position}`);
    if (!answer.ok) throw new Error(await answer.text());
    const purge = await answer.json();
    const cells = (node) => [node.id, node.applied ? "yes" : "not yet", node.at ? clockTime(node.at) : "–", node.after_ms === undefined ? "–" : time(node.after_ms), node.bans === undefined ? "–" : `${plural(node.bans, "ban", "bans")} for ${plural(node.together, "purge", "purges")}`];
    const row = (tag, texts) => make("tr", {}, ...texts.map((text, index) => make(index && tag === "td" ? "td" : "th", { scope: tag === "th" ? "col" : index ? null : "row" }, text)));
    const body = make("tbody", {}, ...purge.nodes.map((node) => row("td", cells(node))));
    const facts = `Position ${purge.position}, answered after ${time(purge.duration_ms)}${purge.soft ? ", soft" : ""}.`;
    more.replaceChildren(make("p", { class: "quiet" }, facts), make("table", {}, make("thead", {}, row("th", ["Node", "Has it", "At", "After", "In"])), body));
  } catch (error) {
    more.replaceChildren(make("p", { class: "quiet" }, String(error.message || error)));
  }
}

/** Asks for the purges that were sent to the other clearcoats. */
async function askElsewhere() {
  if ((known.fleet?.replicas || []).length < 2) return;
  try {
    const answer = await fetch("api/v1/purges/all");
    if (!answer.ok) throw new Error(await answer.text());
    const said = await answer.json();
    known.elsewhere = said.replicas.filter((replica) => !replica.self).flatMap(({ id, purges }) => purges.newest.map((purge) => ({ ...purge, by: id })));
    known.silent = said.missing.map(({ id }) => id);
  } catch {
    known.silent = known.fleet.replicas.filter((replica) => !replica.self).map(({ id }) => id);
  }
  drawPurges();
}

const MOST_PURGES = 40;

function drawPurges() {
  const hasOthers = (known.fleet?.replicas || []).length > 1;
  const except = known.silent.length ? ` but ${known.silent.join(", ")}, which did not say` : "";
  write(byId("purges-of"), hasOthers ? `the newest at all clearcoats${except}` : "the newest");
  const purges = [...known.purges, ...known.elsewhere].sort((a, b) => Date.parse(b.time) - Date.parse(a.time)).slice(0, MOST_PURGES);
  const all = byId("all-purges");
  const isLong = purges.length > FEW_PURGES;
  const isAll = all.getAttribute("aria-expanded") === "true";
  all.hidden = !isLong;
  write(all, isAll ? "Show fewer" : `Show all ${purges.length}`);
  keyed(byId("purges"), isAll ? purges : purges.slice(0, FEW_PURGES), (purge) => `${purge.by || ""} ${purge.position}`, newPurge, (row, purge) => {
    const mark = row.querySelector(".badge");
    const [words, tone] = RESULTS[purge.result] || [purge.result, "warn"];
    write(mark, words);
    mark.dataset.tone = tone;
    const progress = progressOf(purge);
    const has = row.querySelector(".has");
    if (row.open && has.textContent !== progress) fillPurge(row, purge);
    write(has, progress);
  });
  byId("no-purges").hidden = purges.length > 0;
  document.querySelector(".purge-heads").hidden = !purges.length;
}

// A purge from here.

function wanted() {
  const text = byId("purge-what").value.trim();
  return byId("purge-kind").value === "url" ? { url: text } : { tags: text.split(/[\s,]+/).filter(Boolean) };
}

async function purge() {
  const result = byId("purge-result");
  result.dataset.tone = "";
  write(result, "Purging…");
  try {
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${byId("purge-token").value}` };
    const answer = await fetch("api/v1/purge", { method: "POST", headers, body: JSON.stringify(wanted()) });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    write(result, `Purged at position ${said.position}.`);
  } catch (error) {
    result.dataset.tone = "bad";
    write(result, `Not purged: ${error.message || error}`);
  }
}

function preparePurge() {
  const dialog = byId("confirm");
  byId("purge-kind").addEventListener("change", () => {
    const isUrl = byId("purge-kind").value === "url";
    write(byId("purge-what-label"), isUrl ? "URL" : "Tag");
    byId("purge-what").placeholder = isUrl ? "https://shop.example/sale.html" : "cat_p_2046";
  });
  byId("purge").addEventListener("submit", (event) => {
    event.preventDefault();
    const what = wanted();
    const varnish = (known.fleet?.nodes || []).filter((node) => node.role === "varnish").length;
    write(byId("confirm-text"), `${what.url ? `The page ${what.url}` : `Every page with ${what.tags.join(" or ")}`} is dropped from ${varnish} Varnish.`);
    dialog.showModal();
  });
  byId("confirm-no").addEventListener("click", () => dialog.close());
  byId("confirm-yes").addEventListener("click", () => {
    dialog.close();
    purge();
  });
}

// A word about a node from here.

/** What the dialog is about: the node, what is ordered, and whether also if nothing serves then. */
let order = null;

function askOrder(node) {
  const action = orderOf(node);
  order = { node, body: { state: action === "Drain" ? "drain" : "ready" } };
  write(byId("order-title"), `${action} ${node.id}?`);
  write(byId("order-text"), action === "Drain"
    ? `This ${roleName(node.role)} gets no new requests, finishes the ${node.inflight} that it has, and still gets every purge. It stays so, at every clearcoat, until somebody resumes it.`
    : `This ${roleName(node.role)} gets its share of the traffic again, slowly at first.`);
  write(byId("order-result"), "");
  write(byId("order-no"), "Cancel");
  write(byId("order-yes"), action);
  byId("order-yes").hidden = false;
  byId("order-yes").classList.toggle("danger", action === "Drain");
  byId("order-token").value ||= byId("purge-token").value;
  byId("order").showModal();
}

async function sendOrder() {
  const result = byId("order-result");
  const { node, body } = order;
  result.dataset.tone = "";
  write(result, "…");
  try {
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${byId("order-token").value}` };
    const answer = await fetch(`api/v1/nodes/${node.role}/${node.id}`, { method: "POST", headers, body: JSON.stringify(body) });
    const said = await answer.json();
    if (answer.status === 409 && body.state === "drain") {
      body.force = true;
      write(byId("order-yes"), "Drain all the same");
    }
    if (!answer.ok) throw new Error(said.error);
    const open = [said.warning, said.unconfirmed && `Not confirmed by ${said.unconfirmed.join(", ")}: told again and again.`].filter(Boolean);
    if (!open.length) {
      byId("order").close();
      return;
    }
    write(result, `Done. ${open.join(" ")}`);
    write(byId("order-no"), "Close");
    byId("order-yes").hidden = true;
  } catch (error) {
    result.dataset.tone = "bad";
    write(result, `Not done: ${error.message || error}`);
  }
}

function prepareOrder() {
  byId("order-no").addEventListener("click", () => byId("order").close());
  byId("order-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sendOrder();
  });
}

// The stream.

function showLink(state, words) {
  byId("link").dataset.state = state;
  write(byId("link"), words);
  document.body.classList.toggle("stale", state === "lost");
}

function listen() {
  const source = new EventSource("api/v1/events");
  const on = (name, take) => source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  on("hello", (hello) => {
    known.hello = hello;
    ahead = hello.now - Date.now();
    write(byId("version"), hello.version);
    byId("purge").hidden = !hello.may_purge;
    byId("purge-off").hidden = hello.may_purge;
    showLink("live", "live");
  });
  on("history", (samples) => {
    known.samples = samples;
    drawNow();
  });
  on("sample", (sample) => {
    known.samples = [...known.samples, sample].filter(({ at }) => at > sample.at - WINDOW_MS);
    drawNow();
  });
  on("fleet", (fleet) => {
    known.fleet = fleet;
    drawFleet(fleet);
  });
  on("purges", (purges) => {
    known.purges = purges;
    drawPurges();
  });
  source.onerror = () => {
    showLink("lost", "no connection: what is shown is old");
    // A stream that was refused is not opened again by itself.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000);
  };
}

byId("all-purges").addEventListener("click", (event) => {
  event.target.setAttribute("aria-expanded", String(event.target.getAttribute("aria-expanded") !== "true"));
  drawPurges();
});
PLOTS.forEach(prepare);
preparePurge();
prepareOrder();
listen();
setInterval(askElsewhere, 5000);
// "for 42 s" goes on although nothing comes in.
setInterval(() => known.fleet && drawVerdict(known.fleet), 1000);
