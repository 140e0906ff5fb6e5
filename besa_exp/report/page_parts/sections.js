// The sections: each reads the filters and draws itself anew.

const methodName = (method) => element("span", { class: "method" }, glyph(method), data.methods[method].label);
const comparable = (kind) => data.cells.filter((cell) => !cell.apart && data.measures[cell.measure].kind === kind && passes(cell));

function showScores(kind) {
  let cells = comparable(kind);
  if (kind === "zero_shot") cells = cells.filter((cell) => cell.measure === Number(byId("task").value));
  const pairs = unique(cells.map((cell) => JSON.stringify([cell.model, cell.measure]))).map((pair) => JSON.parse(pair));
  const cards = pairs.map(([model, measure]) => {
    const own = cells.filter((cell) => cell.model === model && cell.measure === measure);
    const reach = own.flatMap((cell) => [cell.mean - (cell.spread || 0), cell.mean + (cell.spread || 0)]);
    const y = kind === "zero_shot" ? axis("accuracy") : byId("logarithmic").checked ? logarithmic("perplexity", reach) : axis("perplexity");
    const { label } = data.measures[measure];
    const made = card(model, label === model ? null : label, `${label} of ${model} against measured sparsity`);
    return { ...made, traces: scoreTraces(own, kind), layout: layout(axis("measured sparsity", { tickformat: ".3~%" }), y) };
  });
  const some = data.cells.some((cell) => data.measures[cell.measure].kind === kind);
  const none = some ? "No score passes the filters." : `No run measured ${kind === "perplexity" ? "a perplexity" : "a zero-shot task"}.`;
  showCharts(document.querySelector(`[data-scores="${kind}"]`), cards, none);
  fill(document.querySelector(`[data-legend="${kind}"]`), legendOf(cells.map((cell) => cell.method)));
  const tables = pairs.map(([model, measure]) => matrix(cells.filter((cell) => cell.model === model && cell.measure === measure), `${model}: ${data.measures[measure].label}`));
  fill(document.querySelector(`[data-numbers="${kind}"]`), tables.length ? tables : empty(none));
}

const stacked = (text, below) => element("span", { class: "stack" }, element("span", {}, text), below ? element("span", { class: "minor" }, below) : null);

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
    const own = lines.filter((line) => line.model === model);
    const x = axis("block", { dtick: own[0].blocks.length <= 16 ? 1 : undefined });
    return { ...card(model, null, `Reconstruction loss of ${model} by block`), traces: errorTraces(own), layout: layout(x, logarithmic("reconstruction loss", own.flatMap((line) => line.means))) };
  });
  fill(document.querySelector('[data-legend="depth"]'), legendOf(lines.map((line) => line.method)));
  showCharts(byId("depth-charts"), cards, data.depth.length ? "No run at this target passes the filters." : "No finished run has reconstruction losses.");
}

function offerRuns() {
  const select = byId("chosen");
  const before = select.value;
  const runs = finishedRuns();
  fill(select, unique(runs.map((run) => run.model)).map((model) => element("optgroup", { label: model }, runs.filter((run) => run.model === model)
    .map((run) => element("option", { value: run.id }, `${data.methods[run.method].label}, ${targetName(run.target)}, seed ${run.seed}`)))));
  if (runs.some((run) => String(run.id) === before)) select.value = before;
  else {
    const nearest = [...runs].sort((a, b) => Math.abs(a.target - 0.5) - Math.abs(b.target - 0.5));
    const telling = nearest.find((run) => data.methods[run.method].pruner === "besa") || nearest.find((run) => run.curve.blocks.length) || nearest[0];
    if (telling) select.value = telling.id;
  }
}

function showRun() {
  const place = byId("run-body");
  free(place);
  const run = data.runs.find((other) => String(other.id) === byId("chosen").value);
  if (!run) return fill(place, empty("No finished run passes the filters."));
  const charts = element("div", { class: "charts" });
  fill(place, facts(run), charts, details(run));
  const thinned = run.curve.stride > 1 ? `Every ${run.curve.stride} steps.` : "Every step.";
  const cards = [[card("Sparsity by block and linear, in %", `Orange: more zeros than the model’s ${percent(run.measured)}; violet: fewer.`, "Heat map of sparsity by block and linear"), allocationChart(run)]];
  if (run.curve.blocks.length) cards.push([card("Loss of the search", thinned), curveChart(run)]);
  cards.push([card("Reconstruction loss before and after", "On held-out calibration samples."), lossChart(run)]);
  showCharts(charts, run.allocation.blocks.length ? cards.map(([made, chart]) => ({ ...made, ...chart })) : [], "This run pruned no block.");
  if (!run.curve.blocks.length) charts.append(element("div", { class: "card" }, element("h3", {}, "Loss of the search"), empty("This method takes no optimisation steps.")));
}

const missText = (run) => run.missed ? `missed by ${Math.abs(100 * run.missed).toFixed(1)} points` : "";

function facts(run) {
  const { calibration } = run;
  const pairs = [
    ["Measured sparsity", `${percent(run.measured, 3)} (target ${[targetName(run.target), missText(run)].filter(Boolean).join(", ")})`], ["Pattern", run.pattern], ["Seed", run.seed],
    ...run.scores.map(([measure, value]) => [`${data.measures[measure].kind === "perplexity" ? "Perplexity" : "Zero-shot"} ${data.measures[measure].label}`, scoreText(data.measures[measure].kind, value)]),
    ...Object.entries(run.unavailable).map(([name, reason]) => [name, `n/a: ${reason}`]),
    ...Object.entries(run.quantisation).map(([name, value]) => [`Quantised, ${name.replace("_", " ")}`, value ?? "all inputs of a row"]),
    ["Time", `${duration(run.seconds.total)}, pruning ${duration(run.seconds.prune)}`], ["Peak memory", bytes(run.memory.host) + (run.memory.device ? `, device ${bytes(run.memory.device)}` : "")],
  ];
  const set = `${calibration.name ?? "unknown"}, ${calibration.num_samples ?? "?"} × ${calibration.seq_len ?? "?"} tokens, sha256 ${calibration.tokens_sha256 || "not recorded"}`;
  const wide = [["Calibration", set], ["Folder", run.folder], ["Command", run.command || "not recorded"]];
  const entry = (kind) => ([name, value]) => element("div", { class: kind }, element("dt", {}, name), element("dd", {}, kind ? element("code", {}, String(value)) : String(value)));
  return element("dl", { class: "facts-of" }, pairs.map(entry(null)), wide.map(entry("whole")));
}

function details(run) {
  const part = (title, value) => element("details", { class: "more" }, element("summary", {}, title), element("pre", { tabindex: "0" }, JSON.stringify(value, null, 2)));
  return element("div", {}, simulatedSpeed(run.simulated_speed), part("Configuration", run.config), part("Environment", data.environments[run.environment]), part("Calibration set", run.calibration));
}

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
  const measured = (kind, model) => unique(runs.filter((run) => run.model === model).flatMap((run) => run.scores.map(([measure]) => measure)))
    .filter((measure) => data.measures[measure].kind === kind);
  const several = unique(runs.map((run) => run.model)).flatMap((model) => ["perplexity", "zero_shot"].filter((kind) => measured(kind, model).length > 1).map((kind) => `${kind} ${model}`));
  const scores = (run, kind) => run.scores.filter(([measure]) => data.measures[measure].kind === kind).sort(([a], [b]) => a - b).slice(0, 3);
  const scoreColumn = (kind, head) => ({
    head, number: true, key: (run) => scores(run, kind)[0]?.[1],
    of: (run) => element("span", { class: "stack" }, scores(run, kind).map(([measure, value]) => element("span", {},
      scoreText(kind, value), several.includes(`${kind} ${run.model}`) ? element("span", { class: "minor" }, ` ${data.measures[measure].label.split("/").pop()}`) : ""))),
  });
  const columns = [
    { head: "model", of: (run) => run.model, key: (run) => run.model },
    { head: "method", of: (run) => methodName(run.method), key: (run) => run.method },
    { head: "target", number: true, of: (run) => targetName(run.target), key: (run) => run.target },
    { head: "measured", number: true, of: (run) => stacked(percent(run.measured), missText(run)), key: (run) => run.measured },
    { head: "seed", number: true, of: (run) => String(run.seed), key: (run) => run.seed },
    scoreColumn("perplexity", "perplexity"), scoreColumn("zero_shot", "zero-shot"),
    { head: "pruning", number: true, of: (run) => duration(run.seconds.prune), key: (run) => run.seconds.prune },
    { head: "details", of: (run) => element("button", { type: "button", "aria-label": `Show ${run.folder}`, onclick: () => { byId("chosen").value = run.id; showRun(); byId("run").scrollIntoView(); byId("chosen").focus({ preventScroll: true }); } }, "Show") },
  ];
  fill(byId("runs-table"), runs.length ? table(columns, runs, { caption: "All runs", tall: true, sortable: true, sorted: 0 }) : empty("No finished run passes the filters."));
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
