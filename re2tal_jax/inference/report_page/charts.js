// Small pictures in svg, and the few helpers that build elements. Text is set as text, never parsed.

const SVG = "http://www.w3.org/2000/svg";

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role" || key === "for" || key === "scope") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)}\u2009%`;
}

function number(count) {
  return count.toLocaleString("en");
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const rest = `${String(minutes).padStart(hours ? 2 : 1, "0")}:${String(whole % 60).padStart(2, "0")}`;
  return hours ? `${hours}:${rest}` : rest;
}

/** A time to hundredths of a second. */
function moment(seconds) {
  const hundredths = Math.round(Math.max(seconds, 0) * 100);
  return `${clock(hundredths / 100)}.${String(hundredths % 100).padStart(2, "0")}`;
}

/** Axes over [0, 1] upwards and `x` across; returns the picture and a function from values to its coordinates. */
function axes({ label, xLabel, yLabel, x, xTicks }) {
  const [width, height, left, right, top, bottom] = [360, 240, 46, 14, 10, 40];
  const picture = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "chart" });
  const place = (a, b) => [
    left + ((a - x[0]) / (x[1] - x[0] || 1)) * (width - left - right),
    height - bottom - b * (height - top - bottom),
  ];
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    const [x0, y] = place(x[0], value);
    picture.append(
      shape("line", { x1: x0, x2: width - right, y1: y, y2: y, class: "grid" }),
      shape("text", { x: x0 - 6, y: y + 4, "text-anchor": "end" }, String(100 * value)),
    );
  }
  for (const value of xTicks) {
    const [x0, y] = place(value, 0);
    picture.append(shape("text", { x: x0, y: y + 16, "text-anchor": "middle" }, String(Math.round(value * 100) / 100)));
  }
  picture.append(
    shape("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel),
    shape("text", { x: 12, y: (height - bottom + top) / 2, class: "upright", "text-anchor": "middle",
      transform: `rotate(-90 12 ${(height - bottom + top) / 2})` }, yLabel),
  );
  return { picture, place };
}

function path(points, place, attributes) {
  const d = points.map(([a, b], i) => `${i ? "L" : "M"}${place(a, b).map((v) => v.toFixed(1)).join(" ")}`).join("");
  return shape("path", { d, fill: "none", ...attributes });
}

/** Bars over bins, each split in two: [lower, upper] counts. */
function bars(pairs, label, className) {
  const most = Math.max(1, ...pairs.map(([low, high]) => low + high));
  const picture = shape("svg", {
    viewBox: `0 0 ${pairs.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label, class: className,
  });
  pairs.forEach(([low, high], i) => {
    const [a, b] = [low, low + high].map((count) => Math.log1p(count) / Math.log1p(most)); // few stay visible beside many
    if (b > a) picture.append(shape("rect", { x: i + 0.08, width: 0.84, y: 1 - b, height: b - a, class: "high" }));
    if (a) picture.append(shape("rect", { x: i + 0.08, width: 0.84, y: 1 - a, height: a, class: "low" }));
  });
  return picture;
}

function table(caption, head, rows, className = "") {
  return element("div", { className: `scroll ${rows.length > 12 ? "long" : ""}`, tabIndex: 0, role: "region", "aria-label": caption },
    element("table", { className },
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
      element("tbody", {}, ...rows.map((cells) => element("tr", {}, ...cells.map((cell, i) =>
        i ? element("td", {}, cell) : element("th", { scope: "row" }, cell)))))));
}
