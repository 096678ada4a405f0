// What was found: the greedy rule of the evaluation, and why a detection is false (the kinds of diagnosis.py).

const SMALLEST_TIOU = 0.1;

function tiou(aStart, aEnd, bStart, bEnd) {
  const intersection = Math.max(Math.min(aEnd, bEnd) - Math.max(aStart, bStart), 0);
  return intersection / Math.max(aEnd - aStart + (bEnd - bStart) - intersection, 1e-8);
}

/** A video of the data with its lists taken apart: detections best first, `truth` null where nothing is annotated. */
class Video {
  constructor({ id, duration, found, truth, media }) {
    Object.assign(this, { id, duration, media });
    this.found = [];
    for (let i = 0; i < found.length; i += 4) {
      this.found.push({ start: found[i], end: found[i + 1], label: found[i + 2], score: found[i + 3] });
    }
    this.truth = truth && [];
    for (let i = 0; truth && i < truth.length; i += 3) {
      this.truth.push({ start: truth[i], end: truth[i + 1], label: truth[i + 2] });
    }
  }

  /**
   * Give every detection the segment it finds, and every segment its finder, null if none. Each detection in turn takes
   * the best segment of its class that is left. As the best choose first, a threshold on scores changes no choice.
   */
  match(threshold) {
    for (const segment of this.truth ?? []) segment.finder = null;
    for (const detection of this.found) {
      detection.finds = null;
      let best = threshold;
      for (const segment of this.truth ?? []) {
        if (segment.label !== detection.label || segment.finder) continue;
        const overlap = tiou(detection.start, detection.end, segment.start, segment.end);
        if (overlap >= best) [best, detection.finds] = [overlap, segment];
      }
      if (detection.finds) detection.finds.finder = detection;
    }
  }

  /** Count what is shown under a score threshold, of the classes that `wanted` accepts. */
  count(score, wanted) {
    const counts = { shown: 0, found: 0, wrong: 0, segments: 0, missed: 0 };
    for (const detection of this.found) {
      if (detection.score < score) break;
      if (!wanted(detection.label)) continue;
      counts.shown += 1;
      if (detection.finds) counts.found += 1;
      else if (this.truth) counts.wrong += 1;
    }
    for (const segment of this.truth ?? []) if (wanted(segment.label)) counts.segments += 1;
    counts.missed = counts.segments - counts.found;
    return counts;
  }

  /** Say why a detection is false: its kind, and the segment of the video that it overlaps most. */
  fault(detection, threshold) {
    let best = 0;
    let segment = null;
    for (const other of this.truth) {
      const overlap = tiou(detection.start, detection.end, other.start, other.end);
      const preferred = overlap === best && other.label === detection.label;
      if (overlap > best || (overlap > 0 && preferred)) [best, segment] = [overlap, other];
    }
    const own = segment?.label === detection.label;
    if (best >= threshold) return { kind: own ? "double detection" : "wrong label", overlap: best, segment };
    if (best >= SMALLEST_TIOU) return { kind: own ? "localisation" : "confusion", overlap: best, segment };
    return { kind: "background", overlap: best, segment };
  }
}
