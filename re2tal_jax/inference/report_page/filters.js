// What is chosen above all videos: score threshold, tIoU, classes.

function setThreshold(value, settled) {
  state.threshold = value;
  byId("threshold").value = value;
  byId("threshold").setAttribute("aria-valuetext", value.toPrecision(3));
  if (document.activeElement !== byId("threshold-number")) byId("threshold-number").value = Number(value.toPrecision(4));
  requestUpdate(settled);
}

let pending = null;

/** Show the new state, once for each picture of the screen; a settled change also orders the list anew. */
function requestUpdate(settled = true) {
  if (pending) return void (pending.settled ||= settled);
  pending = { settled };
  requestAnimationFrame(() => {
    const { settled: reorder } = pending;
    pending = null;
    recount();
    if (reorder) relist();
    showVideo();
  });
}

function setUpThreshold() {
  const lowest = Math.min(0, ...videos.map((video) => video.found.at(-1)?.score ?? 0));
  const top = Math.max(highest, data.threshold.value);
  for (const id of ["threshold", "threshold-number"]) Object.assign(byId(id), { min: lowest, max: top, step: "any" });
  byId("threshold").step = (top - lowest) / 400;
  byId("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value), false));
  byId("threshold").addEventListener("change", () => requestUpdate());
  byId("threshold-number").addEventListener("input", (event) => {
    if (event.target.value !== "" && Number.isFinite(Number(event.target.value))) setThreshold(Number(event.target.value), true);
  });
  byId("threshold-reset").addEventListener("click", () => setThreshold(data.threshold.value, true));
  byId("threshold-why").textContent = `Starts at ${data.threshold.value}, which ${data.threshold.why}.`;
  setThreshold(data.threshold.value, true);
}

/** The scores of all detections, right ones below, so that one sees what a threshold cuts off. */
function drawHistogram() {
  const lowest = Number(byId("threshold").min);
  const span = Number(byId("threshold").max) - lowest;
  const bins = Array.from({ length: 48 }, () => [0, 0]);
  for (const video of videos) for (const { score, finds, label } of video.found) {
    if (wanted(label)) bins[Math.min(Math.floor((48 * (score - lowest)) / span), 47)][data.truth && !finds ? 1 : 0] += 1;
  }
  byId("histogram").replaceChildren(bars(bins, "Scores of all detections", "histogram"));
}

function setUpTiou() {
  byId("tiou").append(...data.tious.map((value, i) => element("option", { value: i }, String(value))));
  byId("tiou").value = data.tiou;
  byId("tiou").addEventListener("change", (event) => {
    state.tiou = Number(event.target.value);
    matchAll();
    requestUpdate();
  });
}

function matchAll() {
  for (const video of videos) video.match(data.tious[state.tiou]);
  drawHistogram();
}

function setUpClasses() {
  const chips = data.classes.map((name, label) => {
    const chip = element("button", { type: "button", className: "chip" },
      paint(element("i", { className: "swatch" }), label), element("bdi", {}, name));
    chip.addEventListener("click", () => {
      if (!state.classes.delete(label)) state.classes.add(label);
      changed();
    });
    return chip;
  });
  const show = () => {
    chips.forEach((chip, label) => chip.setAttribute("aria-pressed", state.classes.has(label)));
    byId("class-tools").hidden = chips.length <= 12 && !state.classes.size;
    byId("class-clear").disabled = !state.classes.size;
    byId("class-state").textContent = state.classes.size ? `${state.classes.size} of ${chips.length} shown`
      : `all ${chips.length} shown; choose some to see only these`;
  };
  const changed = () => {
    show();
    drawHistogram();
    requestUpdate();
  };
  show();
  byId("classes").append(...chips);
  byId("class-filter").open = innerWidth > 860; // on a phone the video comes first
  byId("class-search").addEventListener("input", (event) => {
    const text = event.target.value.trim().toLowerCase();
    chips.forEach((chip, label) => { chip.hidden = !data.classes[label].toLowerCase().includes(text); });
  });
  byId("class-clear").addEventListener("click", () => {
    state.classes.clear();
    changed();
  });
}
