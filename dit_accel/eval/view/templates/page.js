"use strict";
const byId = (id) => document.getElementById(id);

// The table sorts by a click, Enter or Space on a heading; rows without a value stay below.
(function sortTable() {
  const table = byId("methods"), body = table.tBodies[0];
  const headings = [...table.querySelectorAll("thead tr:last-child th")];
  const original = [...body.rows];
  const value = (row, column, text) => {
    const cell = row.classList.contains("off") && column > 1 ? null : row.cells[column];
    if (!cell || cell.dataset.value === undefined) return null;
    return text ? cell.dataset.value : Number(cell.dataset.value);
  };
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    button.addEventListener("click", () => {
      const text = button.dataset.kind === "text";
      const first = button.dataset.first || "ascending";
      const now = heading.getAttribute("aria-sort");
      const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = original.map((row) => [row, value(row, column, text)]);
      rows.sort(([a, x], [b, y]) => {
        const off = a.classList.contains("off") - b.classList.contains("off");
        if (off) return off;
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (text ? x.localeCompare(y) : x === y ? 0 : x < y ? -1 : 1);
      });
      body.append(...rows.map(([row]) => row));
      byId("sorted").textContent = `Sorted by ${button.textContent.trim().replace(/\s+/g, " ")}, ${order}`;
    });
  });
})();

// The plot: one picture for each metric and kind of seconds.
(function choosePlot() {
  const box = byId("plots");
  if (!box) return;
  const metric = byId("metric"), phase = byId("phase");
  const show = () => {
    for (const view of box.querySelectorAll(".view")) {
      view.hidden = view.dataset.metric !== metric.value || view.dataset.phase !== phase.value;
    }
  };
  metric.addEventListener("change", show);
  phase.addEventListener("change", show);
  show();
})();

// The players: clips of one sample under one clock.
(function players() {
  const section = byId("players");
  if (!section) return;
  const data = JSON.parse(byId("player-data").textContent);
  const stage = byId("stage"), scrub = byId("scrub"), play = byId("play"), clock = byId("clock");
  const frame = 1 / data.fps;
  let urls = [], clips = [], playing = false, round = 0;

  const short = (text) => (text.length > 90 ? `${text.slice(0, 89)}…` : text);
  data.samples.forEach((sample, i) => byId("sample").add(new Option(short(`${i + 1}. ${sample.prompt || sample.id}`), i)));
  const wanted = defaultRows();
  data.rows.forEach((row, i) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.value = i;
    box.checked = wanted.has(i);
    box.addEventListener("change", show);
    const name = document.createElement("bdi");
    name.textContent = row.name;
    label.append(box, mark(row.method), name);
    byId("chosen").append(label);
  });
  byId("sample").addEventListener("change", show);

  function defaultRows() {
    const methods = data.rows.map((row) => row.method);
    const chosen = new Set([Math.max(0, methods.indexOf("dense"))]);
    for (const method of ["fewer_steps", "ras_sla", "sla", "ras", "cache"]) {
      const i = methods.indexOf(method);
      if (i >= 0 && chosen.size < 4) chosen.add(i);
    }
    return chosen;
  }

  function mark(method) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg"), use = document.createElementNS(space, "use");
    svg.setAttribute("class", `mark m-${method}`);
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    use.setAttribute("href", `#mark-${method}`);
    svg.append(use);
    return svg;
  }

  // A blob plays and seeks in every browser; a video at a data: address does not in all of them.
  function blobUrl(type, base64) {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type }));
    urls.push(url);
    return url;
  }

  function medium(row, sample) {
    const found = sample.media[row.name];
    if (!found) {
      const empty = document.createElement("p");
      empty.className = "empty";
      empty.textContent = "No picture of this sample.";
      return empty;
    }
    const [type, base64] = found;
    const element = document.createElement(type.startsWith("video/") ? "video" : "img");
    const tiny = () => element.classList.toggle("tiny", (element.videoWidth || element.naturalWidth) <= 256);
    if (element instanceof HTMLVideoElement) {
      element.muted = true;
      element.playsInline = true;
      element.preload = "auto";
      element.setAttribute("aria-label", `${row.name}: ${short(sample.prompt)}`);
      element.addEventListener("loadedmetadata", () => { tiny(); tick(); });
      element.addEventListener("ended", restart);
      element.src = blobUrl(type, base64);
      clips.push(element);
    } else {
      element.alt = `${row.name}: ${short(sample.prompt)}`;
      element.addEventListener("load", tiny);
      element.src = `data:${type};base64,${base64}`;
    }
    return element;
  }

  async function show() {
    const mine = ++round, again = playing, at = clips.length ? clips[0].currentTime : 0;
    pause();
    for (const clip of clips) { clip.removeAttribute("src"); clip.load(); }
    urls.forEach((url) => URL.revokeObjectURL(url));
    [urls, clips] = [[], []];
    const sample = data.samples[Number(byId("sample").value)];
    byId("prompt").textContent = sample.prompt;
    const chosen = [...byId("chosen").querySelectorAll(":checked")].map((box) => data.rows[Number(box.value)]);
    stage.replaceChildren(...chosen.map((row) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const name = document.createElement("bdi"), note = document.createElement("small");
      name.textContent = row.name;
      note.textContent = row.note;
      caption.append(mark(row.method), name, note);
      figure.append(caption, medium(row, sample));
      return figure;
    }));
    byId("transport").hidden = byId("keys").hidden = clips.length === 0;
    await Promise.all(clips.map((clip) => new Promise((done) => {
      for (const event of ["loadeddata", "error"]) clip.addEventListener(event, done, { once: true });
    })));
    if (mine !== round || !clips.length) return;
    seek(at);
    if (again) start();
  }

  const length = () => Math.max(0, ...clips.map((clip) => clip.duration || 0));

  function seek(time) {
    const to = Math.max(0, Math.min(time, length()));
    for (const clip of clips) clip.currentTime = Math.min(to, clip.duration || 0);
    tick();
  }

  function start() {
    if (!clips.length) return;
    if (clips[0].currentTime >= length() - frame / 2) seek(0);
    playing = true;
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    // Refused or cut short by the next choice: then nothing plays, which the page shows.
    clips.forEach((clip) => { clip.playbackRate = Number(byId("speed").value); clip.play().catch(() => {}); });
    requestAnimationFrame(follow);
  }

  function pause() {
    playing = false;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
    clips.forEach((clip) => clip.pause());
  }

  function restart() {
    if (!playing || !clips.every((clip) => clip.ended)) return;
    seek(0);
    clips.forEach((clip) => clip.play().catch(() => {}));
  }

  function follow() {
    if (!playing) return;
    const [leader, ...others] = clips;
    for (const clip of others) {
      const off = Math.abs(clip.currentTime - leader.currentTime);
      if (off > 1.5 * frame && !clip.seeking && !clip.ended && !leader.ended) clip.currentTime = leader.currentTime;
    }
    tick();
    requestAnimationFrame(follow);
  }

  function tick() {
    const time = clips.length ? clips[0].currentTime : 0, all = length();
    scrub.max = all || 1;
    scrub.step = frame;
    scrub.value = time;
    clock.textContent = `${time.toFixed(2)} of ${all.toFixed(2)} s`;
    scrub.setAttribute("aria-valuetext", clock.textContent);
  }

  const step = (frames) => { pause(); seek((Math.round(clips[0].currentTime / frame) + frames) * frame + frame / 100); };
  play.addEventListener("click", () => (playing ? pause() : start()));
  byId("back").addEventListener("click", () => step(-1));
  byId("forward").addEventListener("click", () => step(1));
  byId("speed").addEventListener("change", () => clips.forEach((clip) => { clip.playbackRate = Number(byId("speed").value); }));
  scrub.addEventListener("input", () => { pause(); seek(Number(scrub.value) + frame / 100); });
  section.addEventListener("keydown", (event) => {
    if (!clips.length || event.target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = { k: () => play.click(), ",": () => step(-1), ".": () => step(1) }[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  show();
})();

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((x) => { x.open = true; }));
