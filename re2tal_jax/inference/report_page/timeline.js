// The timeline of the open video: ground truth above detections, a playhead, and what the pointer is on.

// Okabe & Ito (2008) without black, which colour-blind readers tell apart; after seven classes the same again, striped.
const PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"];
const TEXTURES = ["plain", "striped", "dotted", "barred"];

/** Put a class's colour and texture on an element. */
function paint(made, label, opacity = 1) {
  made.style.setProperty("--c", PALETTE[label % PALETTE.length]);
  made.style.setProperty("--o", opacity);
  made.dataset.texture = TEXTURES[Math.floor(label / PALETTE.length) % TEXTURES.length];
  return made;
}

/** Black or white, whichever reads better on the class's colour over the page's background. */
function ink(label, opacity, dark) {
  const base = dark ? 26 : 255;
  const channels = [1, 3, 5].map((i) => parseInt(PALETTE[label % PALETTE.length].slice(i, i + 2), 16));
  const [r, g, b] = channels.map((c) => ((c * opacity + base * (1 - opacity)) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.19 ? "#000" : "#fff";
}

/** Give every segment the first row in which it overlaps none before it. */
function rowsOf(segments, gap) {
  const rows = [];
  return segments.map(({ start, end }) => {
    const [from, to] = [Math.min(start, end) - gap, Math.max(start, end) + gap];
    let row = rows.findIndex((taken) => taken.every(([a, b]) => to <= a || b <= from));
    if (row < 0) row = rows.push([]) - 1;
    rows[row].push([from, to]);
    return row;
  });
}

/** Draw a lane of segments, `describe` naming their looks; returns the lane. */
function lane(title, className, segments, duration, describe) {
  const rows = rowsOf(segments, duration * 0.001);
  const count = Math.max(1, ...rows.map((row) => row + 1));
  const height = count > 20 ? 8 : count > 8 ? 14 : 20;
  const body = element("div", { className: "lane-body" });
  body.style.height = `${count * (height + 2)}px`;
  segments.forEach((segment, i) => {
    const { label, opacity, mark, dark, text } = describe(segment);
    const made = paint(element("div", { className: `segment ${mark}` }), label, opacity);
    const from = Math.max(Math.min(segment.start, segment.end), 0);
    made.style.left = `${(100 * Math.min(from, duration)) / duration}%`;
    made.style.width = `${(100 * Math.max(Math.min(Math.max(segment.start, segment.end), duration) - from, 0)) / duration}%`;
    made.style.top = `${rows[i] * (height + 2)}px`;
    made.style.height = `${height}px`;
    made.style.color = ink(label, mark === "missed" ? 0.15 : opacity, dark);
    if (height > 12) made.append(element("span", { dir: "auto" }, text));
    made.segment = segment;
    segment.shownAs = made;
    body.append(made);
  });
  return element("div", { className: `lane ${className}` }, element("div", { className: "lane-title" }, title), body);
}

/** The times of an axis: about `count` round ones. */
function ticks(duration, count) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const step = steps.find((value) => duration / value <= count) ?? 14400;
  const times = [];
  for (let i = 0; i * step <= duration; i += 1) times.push(i * step);
  return times;
}

function axis(duration, count) {
  const made = element("div", { className: "axis" });
  for (const time of ticks(duration, count)) {
    const tick = element("span", {}, Number.isInteger(time) ? clock(time) : moment(time));
    tick.style.left = `${(100 * time) / duration}%`;
    tick.classList.toggle("last", time > 0.94 * duration);
    made.append(tick);
  }
  return made;
}
