"use strict";
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent), { rows, layers, anchors } = data;
const element = (tag, className, text) => { const e = document.createElement(tag); if (className) e.className = className; if (text != null) e.textContent = text; return e; };
const signed = (value, digits = 1) => { const text = value.toFixed(digits); return Number(text) > 0 ? "+" + text : Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "−"); };
const mix = (from, to, share) => from.map((value, at) => Math.round(value + share * (to[at] - value)));
function colour(value) {                // of a value from -1 to 1
  const place = (Math.max(-1, Math.min(1, value)) + 1) / 2 * (anchors.length - 1), at = Math.min(Math.floor(place), anchors.length - 2);
  return mix(anchors[at], anchors[at + 1], place - at);
}
const tint = nats => { const [r, g, b] = colour(nats > 0 ? .62 : -.62); return `rgba(${r}, ${g}, ${b}, ${(.65 * Math.min(Math.abs(nats) / 2, 1)).toFixed(2)})`; };
$("ramp").style.background = `linear-gradient(90deg, ${anchors.map(one => `rgb(${one})`).join(", ")})`;

rows.forEach((row, at) => {
  row.at = at; row.evidence = row.words.reduce((sum, word) => sum + word.evidence, 0);
  row.haystack = [row.text, row.key, ...row.layers.map(one => one.words.map(([word]) => word).join(" "))].join("\n").toLowerCase();
  row.sheet = element("article", "sheet"); row.sheet.id = `image-${at}`;
});

function draw(canvas, scale, row, word) {          // the map of a word, or nothing
  const map = row.maps?.[$("map").value];
  canvas.width = map ? map.columns : 1; canvas.height = map ? map.rows : 1; scale.textContent = "";
  if (word < 0 || !map) return;
  if (!map.values) map.values = Int8Array.from(atob(map.bytes), one => one.charCodeAt(0));
  const context = canvas.getContext("2d"), size = map.rows * map.columns, pixels = context.createImageData(map.columns, map.rows);
  for (let at = 0; at < size; at++) {
    const value = map.values[word * size + at] / 127;
    pixels.data.set([...colour(value), Math.round(225 * Math.min(1, Math.abs(value) * 1.6))], 4 * at);
  }
  context.putImageData(pixels, 0, 0);
  const own = map.values.subarray(word * size, (word + 1) * size), highest = own.reduce((a, b) => Math.max(a, b), -127);
  scale.textContent = `highest ${signed(highest / 127 * map.peak, 2)} nats`;
}

function owes(line, word) {
  line.replaceChildren(element("b", "", `${word.text} ${signed(word.evidence)} nats`), " ");
  layers.forEach((layer, at) => line.append(element("span", "", `${layer} ${signed(word.alone[at])} alone, ${signed(word.lost[at])} lost`), " "));
}

function fill(row) {
  if (row.sheet.childElementCount) return;
  const stage = element("div", "stage"), picture = element("img"), canvas = element("canvas"), scale = element("span", "scale");
  const said = element("div"), key = element("div", "key"), sentence = element("p", "sentence"), line = element("p", "owes"), list = element("ul", "layers");
  picture.src = row.picture; picture.alt = row.key || `image ${row.at + 1}`; picture.width = row.size[0]; picture.height = row.size[1]; picture.style.height = "auto";
  ["left", "top", "width", "height"].forEach((side, at) => { canvas.style[side] = `${100 * row.crop[at]}%`; });
  stage.append(picture, canvas, scale);
  key.append(element("span", "", row.key || `image ${row.at + 1}`));
  if (row.words.length) key.append(element("span", "", `${signed(row.evidence)} nats`));
  if (row.p != null) {
    const few = 1 / (1 + row.permutations) > .05;  // no p-value can be as small as that
    key.append(element("span", !few && row.p > .05 ? "chance" : "", `${signed(row.elsewhere)} elsewhere, ${few ? "too few to judge" : `p ${row.p.toFixed(2)}`}`));
  }
  let kept = -1;
  const show = at => { draw(canvas, scale, row, at); at < 0 ? line.replaceChildren() : owes(line, row.words[at]); };
  row.again = () => show(kept);
  row.words.forEach((word, at) => {
    const button = element("button", "", word.text);
    button.style.setProperty("--tint", tint(word.evidence)); button.title = `${signed(word.evidence, 2)} nats`; button.setAttribute("aria-pressed", "false");
    button.onmouseenter = button.onfocus = () => show(at); button.onmouseleave = button.onblur = () => show(kept);
    button.onclick = () => {
      kept = kept === at ? -1 : at;
      [...sentence.querySelectorAll("button")].forEach((one, number) => one.setAttribute("aria-pressed", number === kept));
      show(kept < 0 ? at : kept);
    };
    sentence.append(button, " ");
  });
  if (!row.words.length) sentence.append(element("span", "", row.text || "(no words)"));
  row.layers.forEach(one => {
    const item = element("li"), words = element("span");
    one.words.forEach(([word, nats]) => { const e = element("span", "tinted", word); e.style.setProperty("--tint", tint(nats)); e.title = `${signed(nats, 2)} nats`; words.append(e, " "); });
    if (!one.words.length) words.append("(no words)");
    item.append(element("span", "", one.layer), words); list.append(item);
  });
  said.append(key, sentence, line, list); row.sheet.append(stage, said); show(-1);
}

const watch = new IntersectionObserver(entries => entries.forEach(entry => { if (entry.isIntersecting) { fill(rows[Number(entry.target.id.slice(6))]); watch.unobserve(entry.target); } }), { rootMargin: "1000px" });
const orders = { order: (a, b) => a.at - b.at, most: (a, b) => b.evidence - a.evidence, least: (a, b) => a.evidence - b.evidence, chance: (a, b) => (b.p ?? -1) - (a.p ?? -1) || a.at - b.at };
function choose() {
  const words = $("query").value.toLowerCase().split(/\s+/).filter(Boolean), found = rows.filter(row => words.every(word => row.haystack.includes(word)));
  found.sort(orders[$("sort").value]);
  $("sheets").replaceChildren(...found.map(row => row.sheet));
  if (!found.length) $("sheets").append(element("p", "nothing", "No image matches. Try another word."));
  found.forEach(row => { if (!row.sheet.childElementCount) watch.observe(row.sheet); });
  $("count").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} images`;
}
$("query").oninput = $("sort").onchange = () => { choose(); if ($("images").getBoundingClientRect().top < 0) $("images").scrollIntoView(); };
$("map").onchange = () => rows.forEach(row => row.again?.());
$("theme").onclick = () => { const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches; root.dataset.theme = dark ? "light" : "dark"; };
document.querySelectorAll("[data-find]").forEach(button => { button.onclick = () => { $("query").value = button.dataset.find; choose(); $("images").scrollIntoView({ behavior: "smooth" }); }; });
document.onkeydown = event => { if (event.key === "/" && event.target.tagName !== "INPUT") { event.preventDefault(); $("query").focus(); } };
window.onbeforeprint = () => rows.forEach(row => { if (row.sheet.isConnected) fill(row); });
choose();
