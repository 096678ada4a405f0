// What the page shows: the data, and what was chosen.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const videos = data.videos.map((entry) => new Video(entry));
const highest = videos.reduce((most, video) => Math.max(most, video.found[0]?.score ?? 0), 0) || 1;
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { threshold: data.threshold.value, tiou: data.tiou, classes: new Set(), open: null, listed: [], zoom: 1 };
const wanted = (label) => !state.classes.size || state.classes.has(label);
const isShown = (detection) => detection.score >= state.threshold && wanted(detection.label);
let mediaUrl = null;
let position = 0; // of the playhead, in seconds

function plural(count, what) {
  return `${number(count)} ${what}${count === 1 ? "" : "s"}`;
}

function verdict(detection) {
  if (!state.open.truth) return { mark: "unknown", text: "" };
  if (detection.finds) return { mark: "right", text: "found" };
  const { kind, overlap, segment } = state.open.fault(detection, data.tious[state.tiou]);
  const near = segment && kind !== "background" ? `, tIoU ${overlap.toFixed(2)} with ${data.classes[segment.label]}` : "";
  return { mark: "wrong", text: `false: ${kind}${near}` };
}

/** A segment of the ground truth is missed when no detection that is shown finds it. */
function isMissed(segment) {
  return !segment.finder || segment.finder.score < state.threshold;
}
