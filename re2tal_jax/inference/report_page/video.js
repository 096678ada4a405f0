// The open video: its player, its timeline and what pointer and keys do there, its tables.

function open(video) {
  if (state.open === video) return;
  state.open = video;
  state.zoom = 1;
  position = 0;
  byId("name").textContent = video.id;
  showMedia(video);
  showVideo();
  markOpen();
}

function showMedia(video) {
  if (mediaUrl) URL.revokeObjectURL(mediaUrl);
  mediaUrl = null;
  const { carried, mime, link, note } = video.media;
  byId("note").textContent = note ?? "";
  byId("note").hidden = !note;
  if (!carried && !link) {
    byId("player").replaceChildren();
    return;
  }
  const player = element("video", { controls: true, preload: "metadata", playsInline: true, "aria-label": video.id });
  player.addEventListener("timeupdate", movePlayhead);
  player.addEventListener("seeking", movePlayhead);
  player.addEventListener("loadedmetadata", movePlayhead);
  player.addEventListener("play", followPlayer);
  player.addEventListener("error", () => {
    byId("note").textContent = `${note ?? ""} The browser cannot play this file.`.trim();
    byId("note").hidden = false;
  });
  byId("player").replaceChildren(player);
  if (link) player.src = link;
  else afterParsing(() => {
    if (state.open !== video) return;
    mediaUrl = URL.createObjectURL(decode(byId(carried).textContent, mime));
    player.src = mediaUrl;
  });
}

/** Videos lie behind this script in the file: wait until the whole file has been read. */
function afterParsing(action) {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", action, { once: true });
  else setTimeout(action, 0);
}

function decode(text, mime) {
  const parts = [];
  for (let i = 0; i < text.length; i += 1 << 20) { // a multiple of 4: each part is base64 of its own
    parts.push(Uint8Array.from(atob(text.slice(i, i + (1 << 20))), (letter) => letter.charCodeAt(0)));
  }
  return new Blob(parts, { type: mime });
}

const player = () => byId("player").firstChild;

function seek(seconds, play = false) {
  position = Math.min(Math.max(seconds, 0), state.open.duration);
  const video = player();
  if (video) {
    video.currentTime = position;
    if (play) video.play().catch(() => {});
  }
  movePlayhead();
}

function movePlayhead() {
  const video = player();
  if (video && video.readyState) position = video.currentTime;
  const share = Math.min(position / state.open.duration, 1);
  byId("timeline").style.setProperty("--at", `${100 * share}%`);
  byId("timeline").setAttribute("aria-valuenow", position.toFixed(1));
  byId("timeline").setAttribute("aria-valuetext", `${moment(position)} of ${moment(state.open.duration)}`);
}

/** While it plays the playhead moves with every picture: "timeupdate" alone comes four times a second. */
function followPlayer() {
  const video = player();
  movePlayhead();
  keepPlayheadInView();
  if (video && !video.paused && !video.ended) requestAnimationFrame(followPlayer);
}

function keepPlayheadInView() {
  const at = (byId("timeline").clientWidth * position) / state.open.duration;
  const { scrollLeft, clientWidth } = byId("window");
  if (at < scrollLeft || at > scrollLeft + clientWidth) byId("window").scrollLeft = at - clientWidth / 4;
}

function zoom(factor) {
  state.zoom = Math.min(Math.max(state.zoom * factor, 1), 64);
  showVideo();
  byId("window").scrollLeft = (byId("timeline").clientWidth * position) / state.open.duration - byId("window").clientWidth / 2;
}

byId("zoom-in").addEventListener("click", () => zoom(2));
byId("zoom-out").addEventListener("click", () => zoom(0.5));

function togglePlay() {
  const video = player();
  if (!video) return;
  if (video.paused) video.play().catch(() => {});
  else video.pause();
}

function showVideo() {
  const video = state.open;
  const counts = video.count(state.threshold, wanted);
  const facts = [moment(video.duration), plural(counts.shown, "detection") + " shown"];
  if (video.truth) facts.push(plural(counts.segments, "segment"), `${counts.missed} missed`, `${counts.wrong} false`);
  else if (data.truth) facts.push("not annotated");
  byId("facts").textContent = facts.join(" · ");
  byId("timeline").setAttribute("aria-valuemax", video.duration);
  const truth = (video.truth ?? []).filter(({ label }) => wanted(label));
  const found = video.found.filter(isShown);
  const describe = (segment) => {
    const missed = segment.score === undefined && isMissed(segment);
    const mark = segment.score === undefined ? (missed ? "missed" : "right truth") : verdict(segment).mark;
    const sign = { missed: "✕ missed: ", wrong: "✕ ", right: "✓ " }[mark] ?? "";
    const opacity = segment.score === undefined ? 1 : 0.15 + 0.85 * Math.max(segment.score / highest, 0);
    return { label: segment.label, opacity, mark, dark: dark.matches, text: sign + data.classes[segment.label] };
  };
  const lanes = [];
  if (video.truth) lanes.push(lane("Ground truth", "truth-lane", truth, video.duration, describe));
  lanes.push(lane("Detections", "found-lane", found, video.duration, describe));
  byId("timeline").style.width = `${100 * state.zoom}%`;
  byId("zoom-out").disabled = state.zoom === 1;
  byId("zoom-in").disabled = state.zoom === 64;
  byId("zoom-state").textContent = state.zoom === 1 ? "" : `${state.zoom} times`;
  const width = byId("timeline").clientWidth || 600;
  byId("timeline").replaceChildren(...lanes, axis(video.duration, Math.max(2, width / 70)), element("div", { className: "playhead" }));
  showTables(video, truth, found);
  movePlayhead();
}

function showTables(video, truth, found) {
  const name = (label) => element("span", { className: "class-name" },
    paint(element("i", { className: "swatch" }), label), element("bdi", {}, data.classes[label]));
  const jump = (segment) => {
    const button = element("button", { type: "button", className: "jump" }, `${moment(segment.start)}–${moment(segment.end)}`);
    button.setAttribute("aria-label", `Go to ${moment(segment.start)}, ${data.classes[segment.label]}`);
    button.onclick = () => seek(segment.start);
    button.onfocus = button.onmouseenter = () => segment.shownAs?.classList.add("pointed");
    button.onblur = button.onmouseleave = () => segment.shownAs?.classList.remove("pointed");
    return button;
  };
  const row = (segment, mark, text) => element("span", {}, name(segment.label), text && element("span", { className: `verdict ${mark}` }, text));
  const made = [];
  if (video.truth) {
    made.push(table(`Ground truth: ${plural(truth.length, "segment")}`, ["class", "time"], truth.map((segment) => [
      isMissed(segment) ? row(segment, "missed", "✕ missed") : row(segment, "right", `✓ found, score ${segment.finder.score.toFixed(2)}`),
      jump(segment),
    ])));
  }
  const listed = found.slice(0, 200);
  made.push(table(
    `Detections: ${found.length > listed.length ? `the best ${listed.length} of ` : ""}${number(found.length)} shown`,
    ["class", "time", "score"],
    listed.map((detection) => {
      const { mark, text } = verdict(detection);
      return [row(detection, mark, text && `${mark === "right" ? "✓" : "✕"} ${text}`), jump(detection), detection.score.toFixed(3)];
    }),
  ));
  byId("tables").replaceChildren(...made);
}

function timeAt(event) {
  const body = byId("timeline").querySelector(".lane-body").getBoundingClientRect();
  return ((event.clientX - body.left) / body.width) * state.open.duration;
}

byId("timeline").addEventListener("click", (event) => {
  const segment = event.target.closest(".segment")?.segment;
  seek(segment ? segment.start : timeAt(event));
});

byId("timeline").addEventListener("keydown", (event) => {
  const step = event.shiftKey ? 5 : 1;
  const to = {
    ArrowRight: position + step, ArrowLeft: position - step, ArrowUp: position + step, ArrowDown: position - step,
    PageUp: position + 10, PageDown: position - 10, Home: 0, End: state.open.duration,
  }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  seek(to);
  keepPlayheadInView();
});

byId("timeline").addEventListener("pointermove", (event) => {
  const tip = byId("tip");
  const segment = event.target.closest(".segment")?.segment;
  const time = timeAt(event);
  if (!segment && (time < 0 || time > state.open.duration)) return void (tip.hidden = true);
  if (segment) {
    const scored = segment.score !== undefined;
    const judged = scored ? verdict(segment).text : isMissed(segment) ? "missed" : "found";
    tip.replaceChildren(element("b", { dir: "auto" }, data.classes[segment.label]),
      element("div", {}, `${moment(segment.start)}–${moment(segment.end)} (${(segment.end - segment.start).toFixed(1)} s)`),
      element("div", {}, [scored ? `score ${segment.score.toFixed(3)}` : "ground truth", judged].filter(Boolean).join(" · ")));
  } else tip.textContent = moment(time);
  tip.hidden = false;
  const left = Math.min(event.clientX + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${event.clientY + 16}px`;
});
for (const kind of ["pointerleave", "pointerdown"]) byId("timeline").addEventListener(kind, () => { byId("tip").hidden = true; });

document.addEventListener("keydown", (event) => {
  const takesSpace = event.target.closest("input, select, button, video, summary, a");
  if (event.key !== " " || takesSpace || byId("panel-videos").hidden) return;
  event.preventDefault();
  togglePlay();
});
