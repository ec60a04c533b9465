// One listener for every piece of the page: what was clicked is read from its data- attributes.
const place = (stage, event) => {
  const box = stage.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
};
const cell = (stage, x, y) => {
  const [left, top, right, bottom] = stage.dataset.crop.split(",").map(Number);
  const rows = Number(stage.dataset.rows), columns = Number(stage.dataset.columns);
  const column = Math.floor(((x - left) / (right - left)) * columns);
  const row = Math.floor(((y - top) / (bottom - top)) * rows);
  const inside = row >= 0 && column >= 0 && row < rows && column < columns;
  const height = (bottom - top) / rows, width = (right - left) / columns;
  return { row, column, inside, x: left + (column + 0.5) * width, y: top + (row + 0.5) * height, width, height };
};
const put = (mark, at) => {
  mark.style.left = `${100 * (at.x - at.width / 2)}%`;
  mark.style.top = `${100 * (at.y - at.height / 2)}%`;
  mark.style.width = `${100 * at.width}%`;
  mark.style.height = `${100 * at.height}%`;
};
element.addEventListener("pointermove", (event) => {
  const stage = event.target.closest(".dv-stage");
  if (!stage || event.pointerType === "touch") return;
  const at = cell(stage, ...place(stage, event)), hover = stage.querySelector(".dv-hover");
  hover.style.display = at.inside ? "block" : "none";
  if (at.inside) put(hover, at);
});
element.addEventListener("pointerleave", () => {
  element.querySelectorAll(".dv-hover").forEach((hover) => (hover.style.display = "none"));
});
element.addEventListener("click", (event) => {
  const word = event.target.closest("[data-word]");
  if (word) return trigger("select", { word: word.dataset.word, before: word.dataset.before });
  const tile = event.target.closest(".dv-features");
  if (tile) {
    const byKey = event.detail === 0;  // Enter on a tile only chooses the layer
    return trigger("select", { layer: tile.dataset.layer, at: byKey ? null : place(tile, event) });
  }
  const layer = event.target.closest("[data-layer]");
  if (layer) return trigger("select", { layer: layer.dataset.layer, at: null });
  const example = event.target.closest("[data-example]");
  if (example) return trigger("select", { example: Number(example.dataset.example) });
  const stage = event.target.closest(".dv-stage");
  if (stage) {
    const [x, y] = place(stage, event), at = cell(stage, x, y), mark = stage.querySelector(".dv-cell");
    if (mark && at.inside) put(mark, at);
    trigger("select", { x: Math.min(Math.max(x, 0), 0.999999), y: Math.min(Math.max(y, 0), 0.999999) });
  }
});
let byKeys = false;
element.addEventListener("pointerdown", () => (byKeys = false));
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
element.addEventListener("keydown", (event) => {
  const stage = event.target.closest(".dv-stage"), step = STEPS[event.key];
  if (event.key === "Tab") byKeys = false;
  if (!stage || !step) return;
  event.preventDefault();
  const rows = Number(stage.dataset.rows), columns = Number(stage.dataset.columns);
  const row = Math.min(Math.max(Number(stage.dataset.row) + step[0], 0), rows - 1);
  const column = Math.min(Math.max(Number(stage.dataset.column) + step[1], 0), columns - 1);
  stage.dataset.row = row;
  stage.dataset.column = column;
  const [left, top, right, bottom] = stage.dataset.crop.split(",").map(Number);
  const height = (bottom - top) / rows, width = (right - left) / columns;
  const at = { x: left + (column + 0.5) * width, y: top + (row + 0.5) * height, width, height };
  const mark = stage.querySelector(".dv-cell");
  if (mark) put(mark, at);
  byKeys = true;
  trigger("select", { x: at.x, y: at.y });
});
watch("value", () => {
  // A new picture of the stage must not lose the focus of somebody who moves by arrow keys.
  if (byKeys) element.querySelector(".dv-stage")?.focus({ preventScroll: true });
});
