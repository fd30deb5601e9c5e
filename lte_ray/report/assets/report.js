"use strict";
// Draws the curves (with uPlot) and the timelines of a report. All text from a run is set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const axisChoice = document.getElementById("axis");
  const logChoice = document.getElementById("log");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = ["#1f5fbf", "#d9730d", "#2a9d62", "#c43c6b", "#7c5cc4", "#8a6d1f", "#1596a8", "#b0483a", "#5f7a2c", "#c05ac0"];
  const DARK = ["#6ea8ff", "#ffa24d", "#58c98c", "#ff7da6", "#b39bff", "#d9b650", "#4fd0e0", "#ff8f80", "#a3c760", "#eb93eb"];
  const AXIS_NAMES = { samples: "samples", step: "local steps", seconds: "time", bytes: "bytes sent" };
  const plots = new Map();

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (number) => (dark.matches ? DARK : LIGHT)[number % LIGHT.length];

  // -- numbers as text ----------------------------------------------------------------------------------------------------

  function scaled(value, base, units) {
    let size = Math.abs(value), unit = 0;
    while (size >= base * 0.9995 && unit < units.length - 1) { size /= base; unit++; }
    return trim(Math.sign(value) * size) + units[unit];
  }

  function trim(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  function duration(value) {
    const seconds = Math.abs(value);
    if (seconds < 1) return trim(value) + " s";
    if (seconds < 60) return String(Number(value.toFixed(1))) + " s";
    const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
    const two = (n) => String(n).padStart(2, "0");
    return (hours ? hours + ":" + two(minutes) : String(minutes)) + ":" + two(whole % 60);
  }

  const FORMATS = {
    number: (v) => Math.abs(v) >= 1e5 ? scaled(v, 1000, ["", " k", " M", " G", " T"]) : trim(v),
    loss: trim,
    share: (v) => trim(100 * v) + "%",
    bytes: (v) => scaled(v, 1000, [" B", " kB", " MB", " GB", " TB"]),
    seconds: duration,
    samples: (v) => scaled(v, 1000, ["", " k", " M", " G", " T"]),
    step: (v) => scaled(v, 1000, ["", " k", " M", " G", " T"]),
  };
  const shown = (unit, value) => value == null ? "–" : FORMATS[unit](value);

  // -- curves -------------------------------------------------------------------------------------------------------------

  // One x for all lines: the points of all tables in order, with null where a line has none.
  function align(lines, axis) {
    const tables = [...new Set(lines.map((line) => line.table))].filter((t) => data.tables[t].axes[axis]);
    if (tables.length === 1) {
      const table = data.tables[tables[0]];
      return [table.axes[axis], ...lines.map((line) => line.table === tables[0] ? table.columns[line.column] : [])];
    }
    const points = [];
    for (const t of tables) data.tables[t].axes[axis].forEach((x, row) => points.push([x, t, row]));
    points.sort((one, other) => one[0] - other[0]);
    const values = lines.map((line) => points.map(([, t, row]) => t === line.table ? data.tables[t].columns[line.column][row] : null));
    return [points.map((point) => point[0]), ...values];
  }

  function nearest(plot, series, index) {
    const column = plot.data[series];
    if (series === 0 || column[index] != null) return index;
    for (let step = 1; step < column.length; step++) {
      if (column[index - step] != null) return index - step;
      if (column[index + step] != null) return index + step;
    }
    return null;
  }

  function isPositive(columns) {
    return columns.every((column) => column.every((value) => value == null || value > 0));
  }

  function draw(figure) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const place = figure.querySelector(".plot");
    const before = plots.get(figure);
    if (before) before.destroy();
    plots.delete(figure);
    place.replaceChildren();
    const has = (name) => chart.lines.some((line) => data.tables[line.table].axes[name]);
    const axis = [axisChoice.value, ...Object.keys(AXIS_NAMES)].find(has);
    const aligned = align(chart.lines, axis);
    const logarithmic = chart.unit === "loss" && logChoice.checked && isPositive(aligned.slice(1));
    const text = style("--quiet"), grid = style("--line");
    const line = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui, sans-serif" };
    const few = aligned[0].length <= 60;
    plots.set(figure, new uPlot({
      width: place.clientWidth,
      height: 260,
      scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
      axes: [
        { ...line, values: (_, ticks) => ticks.map((v) => shown(axis, v)), space: 70, size: 32, label: AXIS_NAMES[axis], labelSize: 20, labelFont: line.font },
        { ...line, values: (_, ticks) => ticks.map((v) => v == null ? "" : shown(chart.unit, v)), size: 66 },
      ],
      series: [
        { label: AXIS_NAMES[axis], value: (_, v) => shown(axis, v) },
        ...chart.lines.map((each) => ({
          label: each.label,
          stroke: color(each.color) + (each.style === "part" ? "b0" : ""),
          width: each.style === "main" ? 2 : 1,
          dash: each.style === "other" ? [5, 4] : undefined,
          spanGaps: true,
          points: { show: few, size: 4 },
          value: (_, v) => shown(chart.unit, v),
        })),
      ],
      cursor: { dataIdx: nearest },
    }, aligned, place));
  }

  // -- timelines ----------------------------------------------------------------------------------------------------------

  const KINDS = ["training", "waiting", "starting", "merging", "dead"];
  const LEFT = 92, RIGHT = 10, RULER = 22;

  function rowHeight(timeline) {
    return timeline.rows.length > 24 ? 11 : 20;
  }

  function drawTimeline(canvas) {
    const timeline = data.timelines[Number(canvas.dataset.timeline)];
    const height = rowHeight(timeline), width = canvas.clientWidth, total = timeline.rows.length * height + RULER;
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(total * ratio);
    canvas.style.height = total + "px";
    const context = canvas.getContext("2d"), inner = width - LEFT - RIGHT;
    const pixel = (length) => Math.round(length * ratio) / ratio;
    context.scale(ratio, ratio);
    context.font = (height > 12 ? 12 : 9) + "px system-ui, sans-serif";
    timeline.rows.forEach((row, index) => {
      const top = index * height + 1, tall = height - (height > 12 ? 4 : 1);
      context.fillStyle = style("--text");
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(row.name, LEFT - 8, top + tall / 2);
      const count = Math.max(...Object.values(row.shares).map((values) => values.length), 0);
      for (let slice = 0; slice < count; slice++) {
        const x = LEFT + pixel(inner * slice / count), end = LEFT + pixel(inner * (slice + 1) / count);
        let y = top + tall;
        for (const kind of KINDS) {
          const share = (row.shares[kind] || [])[slice] || 0;
          if (!share) continue;
          const part = tall * share / 100;
          const seen = kind === "dead" ? Math.max(part, tall / 2) : part; // no death is too short to be seen
          context.fillStyle = colors[kind];
          y -= part;
          context.fillRect(x, y, end - x, seen);
        }
      }
    });
    context.fillStyle = style("--quiet");
    context.font = "11px system-ui, sans-serif";
    const ticks = width < 560 ? 2 : 5;
    for (let tick = 0; tick <= ticks; tick++) {
      context.textAlign = tick === 0 ? "left" : tick === ticks ? "right" : "center";
      context.fillText(duration(timeline.end * tick / ticks), LEFT + inner * tick / ticks, total - RULER / 2);
    }
  }

  let colors = {};
  function readColors() {
    colors = Object.fromEntries(KINDS.map((kind) => [kind, style("--" + kind)]));
  }

  function readTimeline(event) {
    const canvas = event.currentTarget, timeline = data.timelines[Number(canvas.dataset.timeline)];
    const row = timeline.rows[Math.floor(event.offsetY / rowHeight(timeline))];
    const at = (event.offsetX - LEFT) / (canvas.clientWidth - LEFT - RIGHT);
    const readout = canvas.parentElement.querySelector(".readout");
    if (!row || at < 0 || at >= 1) { readout.textContent = ""; return; }
    const count = Math.max(...Object.values(row.shares).map((values) => values.length), 1), slice = Math.floor(at * count);
    const parts = KINDS.filter((kind) => (row.shares[kind] || [])[slice]).map((kind) => `${kind} ${row.shares[kind][slice]}%`);
    const from = duration(timeline.end * slice / count), to = duration(timeline.end * (slice + 1) / count);
    readout.textContent = `${row.name}, ${from} to ${to}: ${parts.join(", ") || "nothing known"}`;
  }

  // -- the page -----------------------------------------------------------------------------------------------------------

  const figures = [...document.querySelectorAll(".chart")];
  const timelines = [...document.querySelectorAll("canvas[data-timeline]")];
  const pending = new Set(figures);

  function drawPending(figure) {
    if (pending.delete(figure)) { observer.unobserve(figure); draw(figure); }
  }
  const observer = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawPending(entry.target)),
    { rootMargin: "400px" },
  );

  function redraw() {
    readColors();
    timelines.forEach(drawTimeline);
    for (const figure of [...plots.keys()]) {
      plots.get(figure).destroy();
      plots.delete(figure);
      pending.add(figure);
      observer.observe(figure);
    }
  }

  readColors();
  timelines.forEach((canvas) => {
    drawTimeline(canvas);
    canvas.addEventListener("pointermove", readTimeline);
    canvas.addEventListener("pointerleave", () => { canvas.parentElement.querySelector(".readout").textContent = ""; });
  });
  figures.forEach((figure) => observer.observe(figure));
  if (axisChoice) axisChoice.addEventListener("change", redraw);
  if (logChoice) logChoice.addEventListener("change", redraw);
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => [...pending].forEach(drawPending));
  let width = innerWidth, timer = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
  document.documentElement.dataset.ready = "yes";
})();
