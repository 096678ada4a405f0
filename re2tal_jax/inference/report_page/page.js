// Tabs, texts, and the start.

function setUpTabs() {
  const tabs = ["videos", "evaluation"].map((name) => byId(`tab-${name}`));
  byId("tabs").hidden = !data.evaluation;
  const choose = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    if (!byId("panel-videos").hidden) return showVideo();
    player()?.pause();
    const at = `at a tIoU of ${data.tious[state.tiou]} and scores from ${state.threshold.toPrecision(3)}, as chosen under Videos`;
    showEvaluation(data, byId("panel-evaluation"), lengthSection(videos, (segment) => !isMissed(segment), at));
  };
  for (const tab of tabs) tab.addEventListener("click", () => choose(tab));
  byId("tabs").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs.find((tab) => tab.getAttribute("aria-selected") === "false");
    choose(other);
    other.focus();
  });
}

function setUpTexts() {
  document.title = data.title;
  byId("title").textContent = data.title;
  const sum = (list) => list.reduce((a, b) => a + b, 0);
  const parts = [plural(videos.length, "video"), plural(sum(videos.map((v) => v.found.length)), "detection"),
    plural(data.classes.length, "class").replace("classs", "classes")];
  if (data.truth) parts.splice(1, 0, plural(sum(videos.map((v) => v.truth?.length ?? 0)), "ground-truth segment"));
  if (data.evaluation) parts.push(`average mAP ${percent(data.evaluation.average, 2)}`);
  byId("summary").textContent = parts.join(" · ");
  if (!data.truth) for (const made of document.querySelectorAll(".with-truth")) made.remove();
  const sample = (mark, text, opacity = 1) => {
    const box = paint(element("i", { className: `segment ${mark}` }), 0, opacity);
    return element("span", {}, box, text);
  };
  const legend = [sample("right", `opacity is the score, full at ${highest.toPrecision(2)}, the highest`, 0.5)];
  if (data.truth) {
    legend.push(sample("right", "✓ finds a segment"), sample("wrong", "✕ false: dashed", 0.7),
      sample("missed", "✕ missed segment: hollow, hatched"));
  }
  byId("legend").append(...legend, element("span", {}, "Click: seek. Space: play. Arrow keys on the timeline: 1 s, with shift 5 s."));
}

setUpTexts();
if (data.truth) setUpTiou();
setUpClasses();
for (const video of videos) video.match(data.tious[state.tiou]);
setUpTabs();
if (videos.length) {
  recount();
  relist();
  open(state.listed[0]);
  setUpThreshold();
  drawHistogram();
  dark.addEventListener("change", () => showVideo());
  let width = innerWidth;
  addEventListener("resize", () => { // on a phone the height changes while one scrolls
    if (innerWidth === width) return;
    width = innerWidth;
    showVideo();
  });
} else byId("count").textContent = "No videos.";
