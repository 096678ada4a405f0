// The list of videos: counts, order, choice.

const items = new Map(videos.map((video, i) => {
  const item = element("li", { id: `video-${i}`, role: "option", "aria-selected": "false" },
    element("span", { className: "id", dir: "auto" }, video.id), element("span", { className: "counts" }));
  item.video = video;
  return [video, item];
}));

function rank(video) {
  const counts = video.counts;
  return { name: 0, detections: -counts.shown, missed: -counts.missed, wrong: -counts.wrong }[byId("sort").value];
}

/** Count every video anew; cheap enough to follow the slider. */
function recount() {
  const total = { shown: 0, found: 0, wrong: 0, segments: 0, missed: 0 };
  for (const video of videos) {
    video.counts = video.count(state.threshold, wanted);
    for (const key in total) total[key] += video.counts[key];
    const { shown, segments, missed, wrong } = video.counts;
    const text = video.truth ? `${shown} shown · ${segments - missed}/${segments} found · ${wrong} false` : `${shown} shown`;
    const counts = items.get(video).lastChild;
    if (counts.textContent !== text) counts.textContent = text;
    counts.classList.toggle("has-missed", missed > 0);
  }
  if (!data.truth) return;
  const judged = total.found + total.wrong;
  byId("overall").textContent = `${number(total.found)} of ${plural(total.segments, "segment")} found` +
    (total.segments ? ` (recall ${percent(total.found / total.segments)})` : "") +
    `, ${number(total.wrong)} false` + (judged ? ` (precision ${percent(total.found / judged)})` : "");
}

/** Choose and order what the list holds. */
function relist() {
  const text = byId("search").value.trim().toLowerCase();
  const hasClass = (video) => video.counts.shown || video.counts.segments;
  state.listed = videos.filter((video) => video.id.toLowerCase().includes(text) && (!state.classes.size || hasClass(video)));
  state.listed.sort((a, b) => rank(a) - rank(b)); // stable: by name where equal
  const { scrollTop } = byId("list");
  byId("list").replaceChildren(...state.listed.map((video) => items.get(video)));
  byId("list").scrollTop = scrollTop;
  byId("count").textContent = `${number(state.listed.length)} of ${plural(videos.length, "video")}`;
  markOpen();
}

function markOpen() {
  const list = byId("list");
  for (const item of list.querySelectorAll("[aria-selected=true]")) item.setAttribute("aria-selected", "false");
  const item = items.get(state.open);
  if (!item?.isConnected) return list.removeAttribute("aria-activedescendant");
  item.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", item.id);
  const [box, whole] = [item.getBoundingClientRect(), list.getBoundingClientRect()];
  if (box.top < whole.top) list.scrollTop -= whole.top - box.top;
  if (box.bottom > whole.bottom) list.scrollTop += box.bottom - whole.bottom;
}

byId("list").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) open(item.video);
});

byId("list").addEventListener("keydown", (event) => {
  const last = state.listed.length - 1;
  const at = state.listed.indexOf(state.open);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: last }[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  open(state.listed[Math.min(Math.max(to, 0), last)]);
});

byId("search").addEventListener("input", relist);
byId("sort").addEventListener("change", relist);
