// Charts. A method has one colour and one marker everywhere, and no other method has both.

const darkness = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => document.documentElement.dataset.theme === "dark";
const narrow = matchMedia("(max-width: 760px)");
const DIVERGING = {
  light: [[0, "#4b2b85"], [0.25, "#a99bd0"], [0.5, "#f4f3f0"], [0.75, "#e9a35b"], [1, "#9a4300"]],
  dark: [[0, "#b9a6ff"], [0.25, "#6b58a8"], [0.5, "#2a2d35"], [0.75, "#b3661f"], [1, "#ffb067"]],
};
const DEPTH_COLOURS = { light: ["#0b2a5b", "#2f6d8f", "#5a9a7a", "#a8962c", "#b25a00"], dark: ["#8fb4ff", "#6ccbd6", "#8fdc9a", "#e3d05a", "#ffa35c"] };

const colour = (method) => data.methods[method][isDark() ? "dark" : "light"];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function look(method) {
  const { symbol } = data.methods[method];
  return {
    line: { color: colour(method), width: 2 },
    marker: { color: colour(method), symbol, size: symbol.startsWith("triangle") ? 10 : 8, line: { color: variable("--paper"), width: 1 } },
  };
}

const GLYPHS = { // as plotly's markers, in a box from -6 to 6
  "circle": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0", "square": "M-4.5,-4.5h9v9h-9Z", "diamond": "M0,-6L6,0L0,6L-6,0Z",
  "triangle-up": "M0,-5L5.5,4.5H-5.5Z", "triangle-down": "M0,5L5.5,-4.5H-5.5Z", "triangle-left": "M-5,0L4.5,-5.5V5.5Z",
  "triangle-right": "M5,0L-4.5,-5.5V5.5Z", "pentagon": "M0,-5.5L5.4,-1.6L3.4,5H-3.4L-5.4,-1.6Z", "hexagon": "M-5,-3L0,-6L5,-3V3L0,6L-5,3Z",
  "star": "M0,-6L1.6,-2L6,-1.8L2.5,1L3.7,5.2L0,2.8L-3.7,5.2L-2.5,1L-6,-1.8L-1.6,-2Z", "cross": "M-2,-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
  "hexagon2": "M-6,0L-3,-5.2H3L6,0L3,5.2H-3Z", "diamond-tall": "M0,-6.5L4,0L0,6.5L-4,0Z", "hourglass": "M-5,-5.5H5L-5,5.5H5Z",
  "x": "M-5.5,-3L-3,-5.5L0,-2.5L3,-5.5L5.5,-3L2.5,0L5.5,3L3,5.5L0,2.5L-3,5.5L-5.5,3L-2.5,0Z", "line-ew-open": "M-6,-1h5v2h-5ZM1,-1h5v2h-5Z",
};

// The marker of a method, the same in filters, legends and tables.
function glyph(method) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", GLYPHS[data.methods[method].symbol] || GLYPHS.circle);
  path.setAttribute("fill", colour(method));
  made.setAttribute("viewBox", "-7 -7 14 14");
  made.setAttribute("class", "glyph");
  made.setAttribute("aria-hidden", "true");
  made.append(path);
  return made;
}

// A click takes a method out of the charts, or puts it back.
function legendOf(methods, redraw) {
  return element("ul", { class: "legend" }, unique(methods).sort((a, b) => a - b).map((method) => element("li", {},
    element("button", { type: "button", "aria-pressed": String(!hidden.has(method)), title: "Hide or show in the charts", onclick: () => {
      if (!hidden.delete(method)) hidden.add(method);
      redraw();
    } }, glyph(method), data.methods[method].label))));
}

// Ticks of a logarithmic axis: 1, 2, 5 of each power of ten; all nine where the range is short, 1 where it is long.
function logarithmic(title, values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return axis(title, { type: "log" });
  const [low, high] = [Math.log10(Math.min(...positive)), Math.log10(Math.max(...positive))];
  const pad = Math.max(0.03, 0.06 * (high - low));
  const kept = high - low > 3 ? [1] : high - low > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
  const ticks = [];
  for (let power = Math.floor(low - pad); power <= Math.ceil(high + pad); power += 1) {
    ticks.push(...kept.map((factor) => Number((factor * 10 ** power).toPrecision(3))));
  }
  const shown = ticks.filter((tick) => Math.log10(tick) >= low - pad && Math.log10(tick) <= high + pad);
  return axis(title, { type: "log", range: [low - pad, high + pad], tickvals: shown, ticktext: shown.map(String) });
}

function axis(title, more = {}) {
  const line = variable("--line");
  return { title: { text: title, standoff: 8 }, gridcolor: line, zeroline: false, linecolor: line, automargin: true, ...more };
}

function layout(xaxis, yaxis, more = {}) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis, yaxis,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: variable("--ink") },
    margin: { l: 8, r: 8, t: 8, b: 8 }, hovermode: "closest", dragmode: narrow.matches ? false : "zoom",
    hoverlabel: { bgcolor: variable("--paper"), bordercolor: variable("--soft"), font: { color: variable("--ink") }, align: "left" },
    legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { size: 11 } }, showlegend: false, ...more,
  };
}

function card(title, note, label) {
  const plot = element("div", { class: "plot", role: "img", "aria-label": label || title });
  return { plot, node: element("div", { class: "card" }, element("h3", {}, title), note ? element("p", {}, note) : null, plot) };
}

// A chart is drawn when it comes near the window, all of them before printing: two hundred runs open at once.
const waiting = new Map();
const near = new IntersectionObserver((seen) => seen.filter((one) => one.isIntersecting).forEach((one) => drawNow(one.target)), { rootMargin: "300px" });
addEventListener("beforeprint", () => [...waiting.keys()].forEach(drawNow));

function drawNow(plot) {
  near.unobserve(plot);
  const drawing = waiting.get(plot);
  waiting.delete(plot);
  if (drawing) draw(plot, drawing.traces, drawing.layout);
}

function draw(plot, traces, laidOut) {
  Plotly.newPlot(plot, traces, laidOut, {
    responsive: true, displaylogo: false, displayModeBar: false, // dragging zooms, a double click shows all again
  });
}

// Redraws `place`: `cards` are {plot, node, traces, layout}; charts that go are freed.
function showCharts(place, cards, sentence) {
  free(place);
  fill(place, cards.length ? cards.map((item) => item.node) : empty(sentence));
  cards.forEach((item) => {
    if (item.height) item.plot.style.height = `${item.height}px`;
    waiting.set(item.plot, item);
    near.observe(item.plot);
  });
}

function free(place) {
  place.querySelectorAll(".plot").forEach((plot) => {
    near.unobserve(plot);
    if (!waiting.delete(plot)) Plotly.purge(plot);
  });
}

const denseLine = (cell) => ({ text: `dense: ${cell.text}`, line: { color: colour(cell.method), width: 1.5, dash: "dash" } });
const cellText = (cell, kind) => `<b>${markupFree(data.methods[cell.method].label)}</b><br>${markupFree(cell.text)}<br>target ${targetName(cell.target)}, measured ${percent(cell.measured)}`
  + `<br>${cell.values.map((value, at) => `seed ${cell.seeds[at]}: ${scoreText(kind, value)}`).join("<br>")}`;

// Against sparsity, a line a method.
function scoreChart(cells, kind, y) {
  const places = cells.filter((cell) => !isDense(cell.method)).map((cell) => cell.measured);
  const [left, right] = places.length ? [Math.min(...places), Math.max(...places)] : [0, 1];
  const pad = Math.max(0.01, 0.05 * (right - left));
  const range = [Math.max(0, left - pad), Math.min(1, right + pad)];
  const traces = unique(cells.map((cell) => cell.method)).map((method) => {
    const own = cells.filter((cell) => cell.method === method);
    const shared = { name: markupFree(data.methods[method].label), ...look(method), hovertemplate: "%{text}<extra></extra>" };
    if (isDense(method)) {
      const { text, line } = denseLine(own[0]);
      return { ...shared, mode: "lines", x: range, y: [own[0].mean, own[0].mean], text: [text, text], line };
    }
    return {
      ...shared, mode: "lines+markers", x: own.map((cell) => cell.measured), y: own.map((cell) => cell.mean),
      error_y: { type: "data", array: own.map((cell) => cell.spread || 0), color: colour(method), thickness: 1.2, width: 3 },
      text: own.map((cell) => cellText(cell, kind)),
    };
  });
  return { traces, layout: layout(axis("measured sparsity", { tickformat: ".3~%", range }), y) };
}

// One target: methods down, the best on top; each seed a faint dot, the mean with its deviation.
function dotChart(cells, kind, x) {
  const lower = data.measures[cells[0].measure].lower;
  const own = cells.filter((cell) => !isDense(cell.method)).sort((a, b) => (lower ? a.mean - b.mean : b.mean - a.mean));
  const labels = own.map((cell) => markupFree(data.methods[cell.method].label));
  const traces = own.flatMap((cell, at) => [
    { mode: "markers", x: cell.values, y: cell.values.map(() => labels[at]), marker: { color: colour(cell.method), size: 5, opacity: 0.45 }, hoverinfo: "skip" },
    { mode: "markers", x: [cell.mean], y: [labels[at]], marker: look(cell.method).marker, text: [cellText(cell, kind)], hovertemplate: "%{text}<extra></extra>",
      error_x: { type: "data", array: [cell.spread || 0], color: colour(cell.method), thickness: 1.2, width: 3 } },
  ]);
  const dense = cells.find((cell) => isDense(cell.method));
  const shapes = dense ? [{ type: "line", xref: "x", yref: "paper", x0: dense.mean, x1: dense.mean, y0: 0, y1: 1, line: denseLine(dense).line }] : [];
  const y = axis("", { type: "category", categoryorder: "array", categoryarray: [...labels].reverse(), showgrid: true, range: [-0.6, own.length - 0.4] });
  return { traces, layout: layout(x, y, { shapes }), height: 90 + 26 * own.length };
}

// A point a run, against what is left of the parameters.
function sizeChart(runs, measure, y) {
  const traces = unique(runs.map((run) => run.method)).map((method) => {
    const own = runs.filter((run) => run.method === method);
    return {
      name: markupFree(data.methods[method].label), ...look(method), mode: "markers", x: own.map((run) => run.left), y: own.map((run) => scoreOf(run, measure)),
      text: own.map((run) => `<b>${markupFree(data.methods[method].label)}</b><br>${scoreText(data.measures[measure].kind, scoreOf(run, measure))}<br>${percent(run.left)} of the parameters left`),
      hovertemplate: "%{text}<extra></extra>",
    };
  });
  return { traces, layout: layout(axis("parameters left", { tickformat: ".3~%" }), y) };
}

// The recovery: the loss of each step, and of the held-out windows where they were judged.
function recoveryChart(run) {
  const { steps, loss, held_out } = detailsOf(run).recovery_curve;
  const judged = steps.map((_, at) => at).filter((at) => !unknown(held_out[at]));
  const traces = [
    { name: "step", mode: "lines", x: steps, y: loss, line: { width: 1.2, color: variable("--soft") }, hovertemplate: "step %{x}: %{y:.4f}<extra></extra>" },
    { name: "held out", mode: "lines+markers", x: judged.map((at) => steps[at]), y: judged.map((at) => held_out[at]), line: { color: colour(run.method), width: 2 }, hovertemplate: "held out, step %{x}: %{y:.4f}<extra></extra>" },
  ];
  return { traces, layout: layout(axis("step"), axis("loss, nats a token"), { showlegend: true }) };
}

function errorTraces(lines) {
  return lines.map((line) => ({
    name: markupFree(data.methods[line.method].label), ...look(line.method), mode: "lines+markers", x: line.blocks, y: line.means,
    error_y: { type: "data", array: line.spreads, color: colour(line.method), thickness: 1.2, width: 3 },
    text: line.blocks.map((block, at) => `<b>${markupFree(data.methods[line.method].label)}</b><br>block ${block}: ${significant(line.means[at])}`
      + (line.number > 1 ? ` ± ${significant(line.spreads[at])} (${line.number} runs)` : "")),
    hovertemplate: "%{text}<extra></extra>",
  }));
}

const sharesOf = (run) => detailsOf(run).allocation.counts.flat().filter(Boolean).map(([weights, pruned]) => pruned / weights);
const reachOf = (runs, centre) => Math.max(0.005, ...runs.flatMap(sharesOf).map((value) => Math.abs(value - centre)));

// Two runs side by side have one range of colours.
function allocationChart(run, beside) {
  const { linears, blocks, counts } = detailsOf(run).allocation;
  const centre = beside ? (run.measured + beside.measured) / 2 : run.measured;
  const shares = counts.map((row) => row.map((pair) => (pair ? pair[1] / pair[0] : null)));
  const reach = reachOf(beside ? [run, beside] : [run], centre);
  const text = counts.map((row, at) => row.map((pair, column) => (pair
    ? `<b>block ${blocks[at]}, ${markupFree(linears[column])}</b><br>${percent(pair[1] / pair[0], 3)} zeros<br>${pair[1].toLocaleString("en")} of ${pair[0].toLocaleString("en")} weights` : "")));
  const few = blocks.length * linears.length <= 120 && !narrow.matches;
  const traces = [{
    type: "heatmap", x: linears.map(markupFree), y: blocks, z: shares, text, hovertemplate: "%{text}<extra></extra>", xgap: 1, ygap: 1,
    zmin: centre - reach, zmax: centre + reach, colorscale: DIVERGING[isDark() ? "dark" : "light"],
    colorbar: { thickness: 10, outlinewidth: 0, tickformat: ".1%", len: 1 },
  }];
  const annotations = few ? shares.flatMap((row, at) => row.map((value, column) => (value === null ? null : {
    x: markupFree(linears[column]), y: blocks[at], text: (100 * value).toFixed(1), showarrow: false,
    font: { size: 11, color: Math.abs(value - centre) > 0.6 * reach ? (isDark() ? "#14161a" : "#ffffff") : variable("--ink") },
  })).filter(Boolean)) : [];
  const yaxis = axis("block", { autorange: "reversed", showgrid: false, dtick: blocks.length <= 16 ? 1 : undefined });
  return { traces, layout: layout(axis("", { showgrid: false, type: "category" }), yaxis, { annotations }) };
}

function curveChart(run) {
  const palette = DEPTH_COLOURS[isDark() ? "dark" : "light"];
  const { blocks } = detailsOf(run).curve;
  const last = Math.max(1, blocks.length - 1);
  const traces = blocks.map((block, at) => ({
    name: `block ${block.block}`, mode: "lines", x: block.steps, y: block.reconstruction,
    line: { width: 1.6, color: palette[Math.round((at / last) * (palette.length - 1))] },
    text: block.steps.map((step, i) => `<b>block ${block.block}, step ${step}</b><br>reconstruction ${significant(block.reconstruction[i])}`
      + `<br>loss ${significant(block.loss[i])}<br>expected sparsity ${percent(block.expected[i])}`),
    hovertemplate: "%{text}<extra></extra>",
  }));
  return { traces, layout: layout(axis("step"), logarithmic("reconstruction loss", blocks.flatMap((block) => block.reconstruction)), { showlegend: blocks.length <= 12 }) };
}

// The loss of the pruned block; where a method betters its starting mask, what that lost too.
function lossChart(run) {
  const losses = detailsOf(run).blocks;
  const blocks = losses.map((block) => block[0]);
  const betters = losses.some((block) => block[1] !== block[2]);
  const trace = (name, at, dash) => ({
    name, mode: "lines+markers", x: blocks, y: losses.map((block) => block[at]),
    line: { color: colour(run.method), width: 2, dash }, marker: { size: 7, color: colour(run.method), symbol: at === 1 ? "circle-open" : "circle" },
    text: losses.map((block) => `<b>block ${block[0]}</b><br>${betters ? `starting mask ${significant(block[1])}<br>` : ""}pruned block ${significant(block[2])}<br>${duration(block[3])}`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const traces = [...(betters ? [trace("starting mask", 1, "dot")] : []), trace("pruned block", 2, "solid")];
  return { traces, layout: layout(axis("block", { dtick: blocks.length <= 16 ? 1 : undefined }), logarithmic("reconstruction loss", losses.flatMap((block) => [block[1], block[2]])), { showlegend: betters }) };
}

// How sparse the rows are: the median of each linear of each block, with the 5th to the 95th percentile where the bars
// of few blocks can be told apart.
const FEW_BLOCKS = 12;
function rowsChart(run) {
  const { rows } = detailsOf(run);
  const linears = unique(rows.flatMap((row) => Object.keys(row.linears)));
  const palette = DEPTH_COLOURS[isDark() ? "dark" : "light"];
  const few = rows.length <= FEW_BLOCKS;
  const traces = linears.map((linear, at) => {
    const own = rows.filter((row) => row.linears[linear]);
    const q = own.map((row) => row.linears[linear]);
    const x = own.map((row) => row.block + few * (at - (linears.length - 1) / 2) * (0.8 / linears.length));
    return {
      name: markupFree(linear), mode: few ? "markers" : "lines+markers", line: { width: 1, color: palette[at % palette.length] }, x, y: q.map((one) => one[3]),
      marker: { size: 6, color: palette[at % palette.length], symbol: ["circle", "square", "diamond", "cross", "triangle-up", "pentagon", "star"][at % 7] },
      error_y: { visible: few, type: "data", symmetric: false, array: q.map((one) => one[5] - one[3]), arrayminus: q.map((one) => one[3] - one[1]), color: palette[at % palette.length], thickness: 1.2, width: 0 },
      text: own.map((row, i) => `<b>block ${row.block}, ${markupFree(linear)}</b><br>median row ${percent(q[i][3])}<br>half of the rows ${percent(q[i][2])} to ${percent(q[i][4])}<br>all ${percent(q[i][0])} to ${percent(q[i][6])}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  });
  return { traces, layout: layout(axis("block", { dtick: rows.length <= 16 ? 1 : undefined }), axis("sparsity of rows", { tickformat: ".0%" }), { showlegend: linears.length <= 10 }) };
}
