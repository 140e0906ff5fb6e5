// The sections: each reads the filters and draws itself again.

const LONG = 40; // letters of a name that may take more lines than one
const methodName = (method) => {
  const { label } = data.methods[method];
  return element("span", { class: label.length > LONG ? "method long" : "method" }, glyph(method), label);
};
const comparable = (kind) => data.cells.filter((cell) => !cell.apart && data.measures[cell.measure].kind === kind && passes(cell));

const plotted = (cells) => cells.filter((cell) => !hidden.has(cell.method));

// ---- the table of results: methods down, targets across; with one target the scores across
const LOSSES = { perplexity: [0.05, 0.2, 1, 3], zero_shot: [0.01, 0.05, 0.1, 0.2] };
const TINTS = ["little", "some", "much", "high", "extreme"];

function lossOf(cell) {
  const dense = data.cells.find((other) => !other.apart && other.model === cell.model && other.measure === cell.measure && isDense(other.method));
  if (!dense) return null;
  const { kind, lower } = data.measures[cell.measure];
  if (kind === "zero_shot") return lower ? cell.mean - dense.mean : dense.mean - cell.mean;
  return dense.mean ? cell.mean / dense.mean - 1 : null;
}

function tint(cell) {
  const loss = cell && !isDense(cell.method) ? lossOf(cell) : null;
  const bounds = cell && LOSSES[data.measures[cell.measure].kind];
  return unknown(loss) || !bounds ? null : TINTS[bounds.filter((bound) => loss > bound).length];
}

function lossText(cell) {
  const loss = lossOf(cell);
  if (unknown(loss) || isDense(cell.method)) return "";
  return data.measures[cell.measure].kind === "zero_shot" ? `${loss > 0 ? "−" : "+"}${Math.abs(100 * loss).toFixed(1)} points` : loss > 9 ? `× ${Math.round(1 + loss)}` : `${loss < 0 ? "−" : "+"}${Math.abs(100 * loss).toFixed(Math.abs(loss) < 0.1 ? 1 : 0)} %`;
}

function showResults() {
  const cells = data.cells.filter((cell) => !cell.apart && data.measures[cell.measure].main && passes(cell));
  const several = unique(cells.filter((cell) => !isDense(cell.method)).map((cell) => cell.target)).length > 1;
  byId("score").closest(".controls").hidden = !several || byId("score").options.length < 2;
  const tables = unique(cells.map((cell) => cell.model)).map((model) => {
    const own = cells.filter((cell) => cell.model === model && (!several || cell.measure === Number(byId("score").value)));
    const pruned = own.filter((cell) => !isDense(cell.method));
    const across = several ? unique(pruned.map((cell) => cell.target)).sort((a, b) => a - b) : unique(own.map((cell) => cell.measure)).sort((a, b) => a - b);
    const at = (method, column) => own.find((cell) => cell.method === method && (several ? isDense(method) || cell.target === column : cell.measure === column));
    const best = across.map((column) => {
      const rivals = pruned.filter((cell) => !cell.missed && (several ? cell.target : cell.measure) === column);
      const { lower } = data.measures[several ? Number(byId("score").value) : column];
      return rivals.length > 1 ? (lower ? Math.min : Math.max)(...rivals.map((cell) => cell.mean)) : null;
    });
    const columns = [{ head: "method", of: methodName }, ...across.map((column, number) => ({
      head: several ? targetName(column) : `${data.measures[column].label} ${data.measures[column].lower ? "↓" : "↑"}`, number: true, tint: (method) => tint(at(method, column)),
      of: (method) => {
        const cell = at(method, column);
        if (!cell) return "";
        const value = cell.mean === best[number] && !cell.missed ? element("strong", {}, cell.text) : cell.text;
        return stacked(value, [cell.missed ? `at ${percent(cell.measured, 1)}` : "", lossText(cell)].filter(Boolean).join(", "));
      },
    }))];
    const sign = (cell) => (data.measures[cell.measure].lower ? 1 : -1) * cell.mean;
    const rank = (method) => { const cell = across.map((column) => at(method, column)).find(Boolean); return isDense(method) ? -Infinity : cell ? sign(cell) : Infinity; };
    const methods = unique(own.map((cell) => cell.method)).sort((a, b) => rank(a) - rank(b));
    const title = several ? `${model}: ${data.measures[Number(byId("score").value)]?.label ?? ""}` : `${model} at ${across.length ? targetName(pruned[0]?.target ?? 0) : ""}`;
    return methods.length ? table(columns, methods, { caption: title }) : "";
  });
  fill(byId("results-tables"), tables.filter(Boolean).length ? tables : empty("No score passes the filters."));
}

function showScores(kind) {
  let cells = comparable(kind);
  if (kind === "zero_shot") cells = cells.filter((cell) => cell.measure === Number(byId("task").value));
  const pairs = unique(cells.map((cell) => JSON.stringify([cell.model, cell.measure]))).map((pair) => JSON.parse(pair));
  const cards = pairs.map(([model, measure]) => {
    const own = plotted(cells.filter((cell) => cell.model === model && cell.measure === measure));
    if (!own.length) return null;
    const reach = own.flatMap((cell) => [cell.mean - (cell.spread || 0), cell.mean + (cell.spread || 0)]);
    const [low, high] = [Math.min(...reach), Math.max(...reach)];
    const pad = Math.max(0.005, 0.06 * (high - low));
    const scale = kind === "zero_shot" ? axis("accuracy", { range: [Math.max(0, low - pad), Math.min(1, high + pad)] })
      : byId("logarithmic").checked ? logarithmic("perplexity", reach) : axis("perplexity", { range: [Math.max(0, low - 6 * pad), high + 6 * pad] });
    const { label } = data.measures[measure];
    const targets = unique(own.filter((cell) => !isDense(cell.method)).map((cell) => cell.target));
    const made = card(model, [label === model ? "" : label, targets.length === 1 ? `target ${targetName(targets[0])}` : ""].filter(Boolean).join(", "), `${label} of ${model}`);
    return { ...made, ...(targets.length === 1 ? dotChart : scoreChart)(own, kind, scale) };
  }).filter(Boolean);
  const some = data.cells.some((cell) => data.measures[cell.measure].kind === kind);
  const none = some ? "No score passes the filters." : `No run measured ${kind === "perplexity" ? "a perplexity" : "a zero-shot task"}.`;
  showCharts(document.querySelector(`[data-scores="${kind}"]`), cards, none);
  fill(document.querySelector(`[data-legend="${kind}"]`), legendOf(cells.map((cell) => cell.method), redrawCharts));
  const numbers = document.querySelector(`[data-numbers="${kind}"]`);
  const tables = () => pairs.map(([model, measure]) => matrix(cells.filter((cell) => cell.model === model && cell.measure === measure), `${model}: ${data.measures[measure].label}`));
  const box = numbers.parentElement;
  box.ontoggle = () => fill(numbers, box.open ? (pairs.length ? tables() : empty(none)) : []);
  box.ontoggle();
}

const scoreOf = (run, measure) => run.scores.find(([other]) => other === measure)?.[1];

// Where something was removed whole.
function showSize() {
  const shrunk = unique(data.runs.filter((run) => !unknown(run.left) && run.left < 1).map((run) => run.model));
  byId("size").hidden = document.querySelector('nav a[href="#size"]').hidden = !shrunk.length;
  if (!shrunk.length) return;
  const measure = Number(byId("size-score").value);
  const { kind, label } = data.measures[measure];
  const runs = finishedRuns().filter((run) => shrunk.includes(run.model) && !unknown(run.left) && !unknown(scoreOf(run, measure)));
  const cards = unique(runs.map((run) => run.model)).map((model) => {
    const own = runs.filter((run) => run.model === model && !hidden.has(run.method));
    const y = kind === "perplexity" ? logarithmic("perplexity", own.map((run) => scoreOf(run, measure))) : axis(label);
    return own.length ? { ...card(model, label, `${label} of ${model} against the parameters left`), ...sizeChart(own, measure, y) } : null;
  }).filter(Boolean);
  fill(document.querySelector('[data-legend="size"]'), legendOf(runs.map((run) => run.method), redrawCharts));
  showCharts(byId("size-charts"), cards, "No run passes the filters.");
}

function redrawCharts() {
  showScores("perplexity");
  showScores("zero_shot");
  showSize();
  showDepth();
}

function stacked(text, below) {
  return element("span", { class: "stack" }, element("span", {}, text), below ? element("span", { class: "minor" }, below) : null);
}

function matrix(cells, caption) {
  const targets = unique(cells.map((cell) => cell.target)).sort((a, b) => a - b);
  const columns = [{ head: "method", of: (method) => methodName(method) }, ...targets.map((target) => ({
    head: targetName(target), number: true, of: (method) => {
      const cell = cells.find((other) => other.method === method && other.target === target);
      if (!cell) return "";
      return stacked(cell.text, cell.missed ? `at ${percent(cell.measured, 1)}` : "");
    },
  }))];
  return table(columns, unique(cells.map((cell) => cell.method)), { caption });
}

function showDepth() {
  const target = Number(byId("depth-target").value);
  const lines = data.depth.filter((line) => line.target === target && chosen.model.has(line.model) && chosen.method.has(line.method));
  const cards = unique(lines.map((line) => line.model)).map((model) => {
    const own = plotted(lines.filter((line) => line.model === model));
    if (!own.length) return null;
    const x = axis("block", { dtick: own[0].blocks.length <= 16 ? 1 : undefined });
    return { ...card(model, null, `Reconstruction loss of ${model} by block`), traces: errorTraces(own), layout: layout(x, logarithmic("reconstruction loss", own.flatMap((line) => line.means))) };
  }).filter(Boolean);
  fill(document.querySelector('[data-legend="depth"]'), legendOf(lines.map((line) => line.method), redrawCharts));
  showCharts(byId("depth-charts"), cards, data.depth.length ? "No run at this target passes the filters." : "No finished run has reconstruction losses.");
}

function offerRuns() {
  const runs = finishedRuns();
  const select = byId("chosen");
  const [before, other] = [select.value, byId("beside").value];
  const offered = () => unique(runs.map((run) => run.model)).map((model) => element("optgroup", { label: model }, runs.filter((run) => run.model === model)
    .map((run) => element("option", { value: run.id }, `${data.methods[run.method].label}, ${targetName(run.target)}, seed ${run.seed}`))));
  fill(select, offered());
  fill(byId("beside"), element("option", { value: "" }, "no other"), ...offered());
  if (runs.some((run) => String(run.id) === other)) byId("beside").value = other;
  if (runs.some((run) => String(run.id) === before)) select.value = before;
  else {
    const nearest = [...runs].sort((a, b) => Math.abs(a.target - 0.5) - Math.abs(b.target - 0.5));
    const telling = nearest.find((run) => data.methods[run.method].pruner === "besa") || nearest.find((run) => run.searched) || nearest[0];
    if (telling) select.value = telling.id;
  }
}

const runNamed = (select) => data.runs.find((run) => String(run.id) === byId(select).value);

function showRun() {
  const place = byId("run-body");
  free(place);
  const run = runNamed("chosen");
  if (!run) return fill(place, empty("No finished run passes the filters."));
  const beside = runNamed("beside");
  const both = beside && beside !== run;
  const holders = (both ? [run, beside] : [run]).map((one) => [one, element("div", { class: "charts" })]);
  fill(place, element("div", { class: both ? "pair" : null }, holders.map(([one, charts]) => element("div", {}, both ? element("h3", {}, methodName(one.method), `, ${targetName(one.target)}, seed ${one.seed}`) : null, facts(one), charts, moreOf(one)))));
  holders.forEach(([one, charts]) => chartsOfRun(one, both ? (one === run ? beside : run) : null, charts));
}

function chartsOfRun(run, beside, place) {
  const { curve, allocation, rows } = detailsOf(run);
  const thinned = curve.stride > 1 ? `One of ${curve.stride} steps is drawn.` : "Every step is drawn.";
  const note = beside ? "Orange: more zeros; violet: fewer. Both runs have one range of colours." : `Orange: more zeros than the model’s ${percent(run.measured)}; violet: fewer.`;
  const cards = [[card("Sparsity by block and linear, in %", note, "Heat map of sparsity by block and linear"), allocationChart(run, beside)]];
  if (rows.length) cards.push([card("Sparsity of rows", rows.length <= FEW_BLOCKS ? "Median and 5th to 95th percentile over the rows of each linear." : "Median over the rows of each linear; each point tells how far they differ."), rowsChart(run)]);
  if (curve.blocks.length) cards.push([card("Loss of the search", thinned), curveChart(run)]);
  if (detailsOf(run).recovery_curve.steps.length) cards.push([card("Recovery", "The whole model tuned, zeros kept."), recoveryChart(run)]);
  if (detailsOf(run).blocks.length) cards.push([card("Reconstruction loss", "On held-out calibration samples."), lossChart(run)]);
  showCharts(place, allocation.blocks.length ? cards.map(([made, chart]) => ({ ...made, ...chart })) : [], "This run pruned no block.");
  if (!curve.blocks.length) place.append(element("div", { class: "card" }, element("h3", {}, "Loss of the search"), empty("This method takes no optimisation steps.")));
}

const missText = (run) => run.missed ? `missed by ${Math.abs(100 * run.missed).toFixed(1)} points` : "";

function facts(run) {
  const { calibration, pattern, unavailable, quantisation, seconds, memory, command, stages } = detailsOf(run);
  const pairs = [
    ["Measured sparsity", `${percent(run.measured, 3)} (target ${[targetName(run.target), missText(run)].filter(Boolean).join(", ")})`], ["Pattern", pattern], ["Seed", run.seed],
    ...run.scores.map(([measure, value]) => [`${data.measures[measure].kind === "perplexity" ? "Perplexity" : "Zero-shot"} ${data.measures[measure].label}`, scoreText(data.measures[measure].kind, value)]),
    ...Object.entries(unavailable).map(([name, reason]) => [name, `n/a: ${reason}`]),
    ...Object.entries(quantisation).map(([name, value]) => [`Quantised, ${name.replace("_", " ")}`, value ?? "all inputs of a row"]),
    ...Object.entries(stages),
    ["Time", `${duration(seconds.total)}, pruning ${duration(seconds.prune)}`], ["Peak memory", bytes(memory.host) + (memory.device ? `, device ${bytes(memory.device)}` : "")],
  ];
  const set = `${calibration.name ?? "unknown"}, ${calibration.num_samples ?? "?"} × ${calibration.seq_len ?? "?"} tokens, sha256 ${calibration.tokens_sha256 || "not recorded"}`;
  const wide = [["Calibration", set], ["Folder", run.folder], ["Command", command || "not recorded"]];
  const entry = (kind) => ([name, value]) => element("div", { class: kind }, element("dt", {}, name), element("dd", {}, kind ? element("code", {}, String(value)) : String(value)));
  return element("dl", { class: "facts-of" }, pairs.map(entry(null)), wide.map(entry("whole")));
}

function moreOf(run) {
  const own = detailsOf(run);
  const part = (title, value) => element("details", { class: "more" }, element("summary", {}, title), element("pre", { tabindex: "0" }, JSON.stringify(value, null, 2)));
  return element("div", {}, plainTable("What it says (greedy)", own.texts), plainTable("Cost", own.cost), simulatedSpeed(own.simulated_speed), part("Configuration", own.config), part("Environment", own.environment), part("Calibration set", own.calibration));
}

const plainTable = (caption, [heads, rows]) => (rows.length
  ? table(heads.map((head, at) => ({ head, class: "wrap", of: (row) => row[at] })), rows, { caption }) : "");

// Cycles of a model of an accelerator: said to be simulated in the caption itself.
function simulatedSpeed(speed) {
  const rows = Object.entries(speed.linears || {});
  if (!rows.length) return "";
  const cycles = (value) => (unknown(value) ? "n/a" : value.toLocaleString("en", { maximumFractionDigits: 1 }));
  return table([
    { head: "linear", of: ([name]) => name }, { head: "sparsity", number: true, of: ([, row]) => percent(row.sparsity) },
    { head: "dense cycles", number: true, of: ([, row]) => cycles(row.dense_cycles) }, { head: "simulated cycles", number: true, of: ([, row]) => cycles(row.sparse_cycles) },
    { head: "simulated speed-up", number: true, of: ([, row]) => (unknown(row.speed_up) ? "n/a" : `${row.speed_up.toFixed(3)}x`) },
  ], rows, { caption: `Speed, ${speed.model}` });
}

function showPaper() {
  byId("paper").hidden = document.querySelector('nav a[href="#paper"]').hidden = !data.paper.length;
  if (!data.paper.length) return;
  const chosenTable = data.paper[Number(byId("paper-measure").value)];
  const columns = [
    { head: "published row", of: (row) => row.name }, { head: "our pruner", of: (row) => element("code", {}, row.pruner) },
    ...chosenTable.models.map((model, at) => ({ head: model, number: true, of: (row) => paperCell(row.cells[at], chosenTable.kind) })),
  ];
  fill(byId("paper-table"), table(columns, chosenTable.rows, { caption: `${chosenTable.title}: paper, ours, difference` }),
    element("p", { class: "lead" }, chosenTable.source ? `Published figures: ${chosenTable.source}.` : "The paper has no figure for this measure."));
}

function paperCell(cell, kind) {
  const digits = kind === "perplexity" ? 2 : 4;
  const number = (value, more = 0) => value.toFixed(digits + more);
  const paper = typeof cell.paper === "number" ? element("span", {}, `paper ${number(cell.paper)}`) : element("span", { class: "missing" }, cell.paper);
  const ours = unknown(cell.ours) ? element("span", { class: "missing" }, "not run") : element("span", {}, `ours ${number(cell.ours)}`, unknown(cell.spread) ? "" : ` ± ${number(cell.spread)} (${cell.number})`);
  const better = kind === "perplexity" ? cell.difference <= 0 : cell.difference >= 0;
  const difference = unknown(cell.difference) ? null : element("span", { class: better ? "better" : "worse" }, `${cell.difference > 0 ? "+" : "−"}${number(Math.abs(cell.difference))}`);
  const remark = cell.remark ? element("span", { class: "minor" }, cell.remark) : null;
  return element("span", { class: "stack" }, paper, ours, difference, remark);
}

function showRuns() {
  const runs = finishedRuns();
  const measures = unique(runs.flatMap((run) => run.scores.map(([measure]) => measure))).filter((measure) => data.measures[measure].main).sort((a, b) => a - b);
  const columns = [
    { head: "method", of: (run) => methodName(run.method), key: (run) => run.method, csv: (run) => data.methods[run.method].label },
    ...(data.models.length > 1 ? [{ head: "model", of: (run) => run.model, key: (run) => run.model }] : []),
    { head: "target", number: true, of: (run) => targetName(run.target), key: (run) => run.target },
    { head: "measured", number: true, of: (run) => stacked(percent(run.measured), missText(run)), key: (run) => run.measured },
    { head: "seed", number: true, of: (run) => String(run.seed), key: (run) => run.seed },
    ...(runs.some((run) => run.left < 1) ? [{ head: "parameters left", number: true, of: (run) => percent(run.left), key: (run) => run.left }] : []),
    ...measures.map((measure) => ({
      head: `${data.measures[measure].label} ${data.measures[measure].lower ? "↓" : "↑"}`, number: true, key: (run) => scoreOf(run, measure),
      of: (run) => (unknown(scoreOf(run, measure)) ? "" : scoreText(data.measures[measure].kind, scoreOf(run, measure))),
    })),
    { head: "pruning", number: true, of: (run) => duration(run.seconds), key: (run) => run.seconds },
    { head: "details", of: (run) => element("button", { type: "button", "aria-label": `Show ${run.folder}`, onclick: () => { byId("chosen").value = run.id; showRun(); byId("run").scrollIntoView(); byId("chosen").focus({ preventScroll: true }); } }, "Show") },
  ];
  byId("csv").onclick = () => saveAs("runs.csv", csvOf([...columns.filter((column) => column.key), { head: "folder", csv: (run) => run.folder }], runs));
  fill(byId("runs-table"), runs.length ? table(columns, runs, { caption: "All runs", sortable: true, sorted: 0, limit: 40 }) : empty("No finished run passes the filters."));
}

// As RFC 4180 has it; heads without their arrows.
function csvOf(columns, rows) {
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${value.replace(/"/g, '""')}"` : value);
  const lines = [columns.map((column) => column.head.replace(/ [↑↓]$/, "")), ...rows.map((row) => columns.map((column) => (column.csv || column.key)(row) ?? ""))];
  return lines.map((line) => line.map((value) => cell(String(value))).join(",")).join("\r\n");
}

function saveAs(name, text) {
  const link = element("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  URL.revokeObjectURL(link.href);
}

function showApart() {
  const cells = data.cells.filter((cell) => cell.apart && passes(cell));
  const columns = [
    { head: "model", of: (cell) => cell.model }, { head: "method", of: (cell) => methodName(cell.method) },
    { head: "target", number: true, of: (cell) => targetName(cell.target) }, { head: "measure", of: (cell) => data.measures[cell.measure].label },
    { head: "value", number: true, of: (cell) => cell.text }, { head: "why apart", class: "wrap", of: (cell) => cell.apart },
    { head: "runs", class: "wrap", of: (cell) => cell.runs.map((id) => data.runs[id].folder).join(", ") },
  ];
  const none = data.cells.some((cell) => cell.apart) ? "Nothing that passes the filters stands apart." : "All scores that were found are comparable.";
  fill(byId("apart-table"), cells.length ? table(columns, cells, { caption: "Not comparable", tall: true }) : empty(none));
}

function showUnfinished() {
  const runs = data.runs.filter((run) => run.status !== "done");
  const columns = [
    { head: "folder", class: "wrap", of: (run) => run.folder, key: (run) => run.folder }, { head: "status", of: (run) => element("span", { class: "state" }, run.status) },
    { head: "error", class: "wrap", of: (run) => run.error || "" },
  ];
  fill(byId("unfinished-table"), runs.length ? table(columns, runs, { caption: "Not finished" }) : empty("All runs that were found are finished."));
}
