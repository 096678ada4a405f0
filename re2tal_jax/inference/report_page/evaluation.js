// What the evaluation says: mAP and recall, curves, classes, errors.

function section(title, explanation, ...children) {
  return element("section", { className: "card" },
    element("h2", {}, title), element("p", { className: "muted" }, explanation), ...children);
}

function mapSection(data, evaluation) {
  const rows = Object.entries(evaluation.rows).map(([name, values]) => {
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return [name, ...[...values, name === "mAP" ? evaluation.average : mean].map((value) => (100 * value).toFixed(1))];
  });
  const made = section("Mean average precision",
    "Mean over classes, by how much a detection must overlap a segment to find it. recall@k: the share of segments that " +
    "one of the best k detections finds, for each segment of the class in the video.",
    table(`Subset ${evaluation.subset}, in %`, ["tIoU", ...data.tious.map(String), "mean"], rows, "figures"));
  if (data.tious.length > 1) {
    const x = [data.tious[0], data.tious.at(-1)];
    const { picture, place } = axes({ label: "mAP by tIoU threshold", xLabel: "tIoU threshold", yLabel: "mAP (%)", x, xTicks: data.tious });
    const points = data.tious.map((t, i) => [t, evaluation.rows.mAP[i]]);
    picture.append(path(points, place, { class: "curve" }));
    for (const [a, b] of points) {
      const [cx, cy] = place(a, b);
      picture.append(shape("circle", { cx, cy, r: 4, class: "dot" }, shape("title", {}, `tIoU ${a}: ${percent(b)}`)));
    }
    made.append(picture);
  }
  const findings = Object.entries(evaluation.findings);
  if (findings.length) {
    made.append(element("h3", {}, "Found on the way"),
      element("ul", {}, ...findings.map(([text, count]) => element("li", {}, `${number(count)} ${text}`))));
  }
  return made;
}

/** Precision over recall: one line for each class, the mean in bold; the chosen class stands out. */
function curveSection(data, evaluation) {
  const holder = element("div", {});
  const tious = element("select", { id: "curve-tiou" },
    ...data.tious.map((t, i) => element("option", { value: i, selected: i === data.tiou }, String(t))));
  const names = element("select", { id: "curve-class" }, element("option", { value: "" }, "all classes"),
    ...evaluation.classes.map((one, i) => element("option", { value: i }, one.name)));
  const draw = () => {
    const chosen = names.value === "" ? null : Number(names.value);
    const { picture, place } = axes({
      label: "Precision over recall", xLabel: "recall (%)", yLabel: "precision (%)", x: [0, 100], xTicks: [0, 25, 50, 75, 100],
    });
    const mean = new Float64Array(101);
    for (const [i, one] of evaluation.classes.entries()) {
      const values = one.precision[tious.value].map((v) => v / 1000);
      mean.forEach((_, r) => { mean[r] += (values[Math.max(Math.ceil((r / 100) * one.segments - 1e-9) - 1, 0)] ?? 0) / evaluation.classes.length; });
      if (evaluation.classes.length > 24 && i !== chosen) continue;
      const points = values.flatMap((v, k) => [[(100 * k) / one.segments, v], [(100 * (k + 1)) / one.segments, v]]);
      if (points.length) points.push([points.at(-1)[0], 0]);
      const line = path(points.length ? points : [[0, 0]], place, { class: i === chosen ? "curve chosen" : "curve thin" });
      line.style.stroke = PALETTE[data.classes.indexOf(one.name) % PALETTE.length];
      line.append(shape("title", {}, `${one.name}: AP ${percent(one.ap[tious.value])}`));
      picture.append(line);
    }
    if (chosen === null) picture.append(path([...mean].map((v, r) => [r, v]), place, { class: "curve" }));
    const ap = chosen === null ? evaluation.rows.mAP[tious.value] : evaluation.classes[chosen].ap[tious.value];
    const text = `${chosen === null ? "mAP" : "AP"} ${percent(ap)}`;
    holder.replaceChildren(picture, element("p", { className: "muted", role: "status" }, text));
  };
  tious.onchange = names.onchange = draw;
  draw();
  return section("Precision and recall",
    "Interpolated precision. The bold line is the mean over classes" +
    (evaluation.classes.length > 24 ? "; choose a class to see its own." : ", thin lines are classes."),
    element("div", { className: "row" }, element("label", { htmlFor: "curve-tiou" }, "tIoU "), tious,
      element("label", { htmlFor: "curve-class" }, "Class "), names), holder);
}

function classSection(data, evaluation) {
  const mean = (one) => one.ap.reduce((a, b) => a + b, 0) / one.ap.length;
  const orders = {
    "worst first": (a, b) => mean(a) - mean(b), "best first": (a, b) => mean(b) - mean(a),
    "by name": (a, b) => a.name.localeCompare(b.name), "most segments": (a, b) => b.segments - a.segments,
  };
  const holder = element("div", {});
  const order = element("select", { "aria-label": "Order of the classes" },
    ...Object.keys(orders).map((name) => element("option", {}, name)));
  order.onchange = () => {
    const rows = [...evaluation.classes].sort(orders[order.value]).map((one) => {
      const bar = element("div", { className: "bar" }, element("i"));
      bar.firstChild.style.width = `${100 * mean(one)}%`;
      paint(bar, Math.max(data.classes.indexOf(one.name), 0));
      return [element("span", { dir: "auto" }, one.name), bar, percent(mean(one)), ...one.ap.map((v) => (100 * v).toFixed(1)),
        number(one.segments), number(one.detections)];
    });
    holder.replaceChildren(table("Average precision by class",
      ["class", "", "mean", ...data.tious.map((t) => `@${t}`), "segments", "detections"], rows, "figures"));
  };
  order.onchange();
  const made = section("Classes", "Average precision of each, mean over tIoU and at each threshold (%).", order, holder);
  made.classList.add("wide");
  return made;
}

const KIND_COLORS = ["#009E73", "#56B4E9", "#E69F00", "#0072B2", "#CC79A7", "#7f7f7f", "#D55E00"];
const KIND_MEANING = {
  "true positive": "finds a segment of its class",
  "double detection": "overlaps enough, but a better scored one found the segment",
  "wrong label": "overlaps a segment of another class enough",
  localisation: "right class, too little overlap",
  confusion: "another class, too little overlap",
  background: "overlaps nothing by 0.1",
  missed: "a segment that no detection of its class finds",
};

function errorSection(data, evaluation) {
  const { kinds, shares, gains, missed, segments, missed_name: missedName } = evaluation.errors;
  const profile = element("div", { className: "profile" });
  shares.forEach((group, g) => {
    if (!group.some((share) => share > 0)) return;
    const rank = g ? `${g}–${g + 1}\u2009n` : "best n";
    const spoken = group.map((share, k) => `${kinds[k]} ${percent(share, 0)}`).join(", ");
    const stack = element("div", { className: "stack", role: "img", "aria-label": `${rank}: ${spoken}` });
    group.forEach((share, k) => {
      if (!share) return;
      const part = element("i", { title: `${kinds[k]}: ${percent(share)}` });
      part.style.cssText = `width:${100 * share}%;background:${KIND_COLORS[k]}`;
      stack.append(part);
    });
    profile.append(element("span", {}, rank), stack);
  });
  const most = Math.max(0.001, ...Object.values(gains));
  const rows = [...kinds.slice(1), missedName].map((kind) => {
    const bar = element("div", { className: "bar" }, element("i"));
    bar.firstChild.style.cssText = `width:${(100 * Math.max(gains[kind], 0)) / most}%;background:${KIND_COLORS[[...kinds, missedName].indexOf(kind)]}`;
    const named = element("span", {}, kind, element("small", { className: "muted" }, KIND_MEANING[kind]));
    return [named, `+${(100 * gains[kind]).toFixed(2)}`, bar];
  });
  const key = element("p", { className: "key" }, ...kinds.map((kind, k) => {
    const swatch = element("i");
    swatch.style.background = KIND_COLORS[k];
    return element("span", {}, swatch, kind);
  }));
  const first = percent(shares[0].slice(1).reduce((a, b) => a + b, 0));
  return section("Errors",
    `What detections are, in order of score: the best n of each class, which has n segments, then the next n, … Were all ` +
    `right, the first bar would be all true positives; ${first} of it is not. Mean over tIoU thresholds. After Alwassel et al.: ` +
    `Diagnosing Error in Temporal Action Detectors, ECCV 2018.`,
    key, profile,
    table("Average mAP won if a kind of error were gone (points)", ["kind", "won", ""], rows, "gains"),
    element("p", { className: "muted" }, `Missed of ${number(segments)} segments, at any score: ` +
      data.tious.map((t, i) => `${number(missed[i])} at tIoU ${t}`).join(", ") + "."));
}

const LENGTHS = [0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, Infinity];

/** Found and missed segments by their length, at what `isFound` says. */
function lengthSection(videos, isFound, at) {
  const bins = LENGTHS.map(() => [0, 0]);
  for (const video of videos) for (const segment of video.truth ?? []) {
    bins[LENGTHS.findIndex((most) => segment.end - segment.start <= most)][isFound(segment) ? 0 : 1] += 1;
  }
  const profile = element("div", { className: "profile counted" });
  bins.forEach(([found, missed], i) => {
    if (!found && !missed) return;
    const stack = element("div", { className: "stack" });
    [found, missed].forEach((count, k) => {
      const part = element("i");
      part.style.cssText = `width:${(100 * count) / (found + missed)}%;background:${KIND_COLORS[k ? 6 : 0]}`;
      stack.append(part);
    });
    const low = i ? LENGTHS[i - 1] : 0;
    const label = LENGTHS[i] === Infinity ? `over ${low}\u2009s` : `${low}–${LENGTHS[i]}\u2009s`;
    profile.append(element("span", {}, label), stack, element("span", {}, `${number(found)} of ${number(found + missed)}`));
  });
  return section("Lengths", `Which share of the segments of a length is found (green), ${at}.`, profile);
}

function showEvaluation(data, panel, lengths) {
  const [map, curves, errors, classes] = [mapSection, curveSection, errorSection, classSection].map((make) => make(data, data.evaluation));
  panel.replaceChildren(element("div", {}, map, curves), element("div", {}, errors, lengths), classes);
}
