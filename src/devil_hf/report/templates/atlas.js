"use strict";
const { meta, units } = window.ATLAS, $ = id => document.getElementById(id);
const GAP = 14, HEIGHT_WITHOUT_STRIP = 122;
const number = (value, digits = 2) => value == null ? "–" : value.toFixed(digits).replace(/^-(0\.0+)$/, "$1");
const element = (tag, className, text) => { const e = document.createElement(tag); if (className) e.className = className; if (text != null) e.textContent = text; return e; };
let found = [], shown = new Map(), opened = -1;

$("layer").append(new Option(meta.layers.length > 1 ? "all layers" : meta.layers[0], ""));
if (meta.layers.length > 1) meta.layers.forEach(name => $("layer").append(new Option(name, name)));
else $("layer").hidden = true;
if (!meta.checked) { $("status").hidden = true; for (const name of ["pearson", "auprc"]) $("sort").querySelector(`[value=${name}]`).remove(); }

function choose() {
  const words = $("query").value.toLowerCase().split(/\s+/).filter(Boolean), layer = $("layer").value, status = $("status").value, key = $("sort").value;
  found = units.filter(unit => (!layer || unit.layer === layer) && (!status || state(unit) === status)
    && words.every(word => /^\d+$/.test(word) ? String(unit.unit) === word || unit.text.includes(word) : unit.text.includes(word)));
  const last = value => value == null ? -Infinity : value;
  if (key === "label") found.sort((a, b) => !a.label - !b.label || a.label.localeCompare(b.label) || a.unit - b.unit);
  else if (key === "unit") found.sort((a, b) => meta.layers.indexOf(a.layer) - meta.layers.indexOf(b.layer) || a.unit - b.unit);
  else found.sort((a, b) => last(b[key]) - last(a[key]) || a.unit - b.unit);
  $("count").textContent = `${found.length.toLocaleString("en")} of ${units.length.toLocaleString("en")} units`;
  shown.forEach(card => card.remove()); shown.clear(); $("space").replaceChildren();
  if (!found.length) $("space").append(element("p", "nothing", "No unit matches. Try another word."));
  draw();
}
const state = unit => !unit.label ? "silent" : unit.passed ? "passed" : "failed";

function draw() {                       // only the cards in sight, and a screen around them, exist
  if (!found.length) { $("space").style.height = "auto"; return; }
  const width = $("space").clientWidth, columns = Math.max(1, Math.floor((width + GAP) / (330 + GAP)));
  const side = (width - (columns - 1) * GAP) / columns, height = HEIGHT_WITHOUT_STRIP + (side - 30 - 16) / 5;
  $("space").style.height = `${Math.ceil(found.length / columns) * (height + GAP)}px`;
  const top = window.scrollY - $("space").offsetTop, screen = window.innerHeight;
  const first = Math.max(0, Math.floor((top - screen) / (height + GAP))) * columns;
  const end = Math.min(found.length, Math.ceil((top + 2 * screen) / (height + GAP)) * columns);
  shown.forEach((card, at) => { if (at < first || at >= end) { card.remove(); shown.delete(at); } });
  for (let at = first; at < end; at++) {
    let card = shown.get(at);
    if (!card) { card = make(found[at], at); shown.set(at, card); $("space").append(card); }
    card.style.cssText = `left:${at % columns * (side + GAP)}px;top:${Math.floor(at / columns) * (height + GAP)}px;width:${side}px;height:${height}px`;
  }
}

function shots(unit, count) {
  const strip = element("div", "strip");
  unit.images.slice(0, count).forEach((image, at) => {
    const shot = element("figure", "shot"), picture = element("img"), mask = element("i"), n = unit.images.length;
    picture.src = `thumbs/${image}.jpg`; picture.loading = "lazy"; picture.alt = meta.keys[image] ?? ""; picture.title = picture.alt;
    mask.style.backgroundImage = `url("masks/${unit.folder}/${unit.unit}.png")`; mask.style.backgroundSize = `${n * 100}% 100%`;
    mask.style.backgroundPosition = `${n > 1 ? at / (n - 1) * 100 : 0}% 0`;
    shot.append(picture, mask);
    if (count > 5) shot.append(element("figcaption", "", number(unit.peaks[at])));
    strip.append(shot);
  });
  return strip;
}
function badge(unit) {
  if (!unit.label) return element("span", "badge failed", "silent");
  return meta.checked ? element("span", `badge ${state(unit)}`, unit.passed ? "✓ passed" : "not passed") : element("span");
}
const tint = value => `color-mix(in srgb, var(--accent) ${Math.round(Math.max(0, Math.min(value / 4, 1)) * 28)}%, transparent)`;
function label(unit) {                  // word by word, each tinted by what it owes to the unit
  const e = element("div", "label"), said = unit.words.map(([word]) => word).join(" ");
  if (!unit.label || said !== unit.label.split(/\s+/).join(" ")) { e.textContent = unit.label || "no activation to speak of"; return e; }
  unit.words.forEach(([word, value], at) => { const part = element("mark", "", word); part.style.background = tint(value); part.title = `${number(value)} nats`; e.append(at ? " " : "", part); });
  return e;
}
function measure(name, value) { const e = element("span", "", name + " "); e.append(element("b", "", value)); return e; }

function make(unit, at) {
  const card = element("div", "card"), top = element("div", "top"), numbers = element("div", "numbers");
  card.tabIndex = 0; card.setAttribute("role", "button");
  top.append(element("span", "", `${unit.layer} · ${unit.name}`), badge(unit));
  numbers.append(measure("evidence", number(unit.evidence)));
  if (meta.checked) numbers.append(measure("r", number(unit.pearson)), measure("AUPRC", number(unit.auprc)));
  card.append(top, label(unit), numbers, shots(unit, 5));
  card.onclick = () => show(at); card.onkeydown = event => { if (event.key === "Enter") show(at); };
  return card;
}

function show(at) {
  opened = (at + found.length) % found.length;
  const unit = found[opened], inside = $("detail").firstElementChild, bar = element("div", "bar"), words = element("div", "words"), table = element("table");
  bar.append(element("span", "", `${unit.layer} · ${unit.name}`), badge(unit));
  for (const [text, title, action] of [["‹", "Previous", () => show(opened - 1)], ["›", "Next", () => show(opened + 1)], ["×", "Close", () => $("detail").close()]]) {
    const button = element("button", "", text); button.title = title; button.onclick = action; bar.append(button);
  }
  for (const [word, value] of unit.words) {
    const e = element("span", "", word); e.append(element("small", "", (value >= 0 ? "+" : "") + value.toFixed(1)));
    e.style.background = tint(value); words.append(e);
  }
  const rows = [["runner-up", unit.runner_up ? `${unit.runner_up} (${number(unit.runner_up_evidence)})` : "–"], ["evidence, nats per token", number(unit.evidence)]];
  if (meta.checked) rows.push(["correlation on held-out", `${number(unit.pearson, 3)} (p ${number(unit.pearson_p, 4)}, q ${number(unit.q, 4)})`], ["AUPRC on held-out", `${number(unit.auprc, 3)} (p ${number(unit.auprc_p, 4)})`]);
  rows.push(["threshold of the masks", number(unit.threshold, 3)]);
  for (const [name, value] of rows) { const row = element("tr"); row.append(element("th", "", name), element("td", "", value)); table.append(row); }
  inside.replaceChildren(bar, label(unit), words, table, shots(unit, 99));
  if (!$("detail").open) $("detail").showModal();
  $("detail").scrollTop = 0; history.replaceState(null, "", `#${unit.layer}/${unit.unit}`);
}

for (const id of ["layer", "status", "sort"]) $(id).onchange = () => { window.scrollTo(0, 0); choose(); };
$("query").oninput = () => { window.scrollTo(0, 0); choose(); };
$("masks").onclick = () => $("masks").setAttribute("aria-pressed", !document.body.classList.toggle("plain"));
$("theme").onclick = () => { const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches); document.documentElement.dataset.theme = dark ? "light" : "dark"; };
$("detail").onclick = event => { if (event.target === $("detail")) $("detail").close(); };
$("detail").onclose = () => history.replaceState(null, "", "#");
document.onkeydown = event => {
  if ($("detail").open && event.key === "ArrowRight") show(opened + 1);
  if ($("detail").open && event.key === "ArrowLeft") show(opened - 1);
  if (event.key === "/" && event.target.tagName !== "INPUT") { event.preventDefault(); $("query").focus(); }
};
let waiting = false;
window.onscroll = window.onresize = () => { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } };
units.forEach(unit => { unit.text = `${unit.label} ${unit.runner_up} ${unit.name === `unit ${unit.unit}` ? "" : unit.name}`.toLowerCase(); });
choose();
const link = decodeURIComponent(location.hash.slice(1)), linked = found.findIndex(unit => `${unit.layer}/${unit.unit}` === link);
if (linked >= 0) show(linked);
