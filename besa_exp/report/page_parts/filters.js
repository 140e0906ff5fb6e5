// What the reader chose: models, methods and targets. Dense scores have no target: they stay as the line to compare with.

const data = JSON.parse(byId("data").textContent);
const chosen = {
  model: new Set(data.models),
  method: new Set(data.methods.map((_, index) => index)),
  target: new Set(data.targets),
};

const hidden = new Set(); // methods that a click in a legend has taken out of the charts
const details = JSON.parse(byId("details").textContent); // JSON of each run, read when it is looked at
const detailsOf = (run) => { run.details ??= JSON.parse(details[run.id]); return run.details; };

const isDense = (method) => data.methods[method].pruner === "dense";
const passes = (item) => chosen.model.has(item.model) && chosen.method.has(item.method) && (isDense(item.method) || chosen.target.has(item.target));
const finishedRuns = () => data.runs.filter((run) => run.status === "done" && passes(run));

function buildFilters(changed) {
  const values = {
    model: data.models.map((model) => [model, model, null]),
    method: data.methods.map((method, index) => [index, method.label, index]),
    target: data.targets.map((target) => [target, targetName(target), null]),
  };
  for (const [name, options] of Object.entries(values)) {
    const place = document.querySelector(`[data-filter="${name}"]`);
    for (const [value, label, method] of options) {
      const box = element("input", { type: "checkbox", checked: true, onchange: (event) => {
        if (event.target.checked) chosen[name].add(value);
        else chosen[name].delete(value);
        changed();
      } });
      const mark = method === null ? null : element("i", { "data-method": method });
      place.append(element("label", { class: "chip" }, box, element("span", {}, mark, label)));
    }
  }
  readLink(values);
  byId("permalink").addEventListener("click", async (event) => {
    const link = linkOf(values);
    try { await navigator.clipboard.writeText(link); event.target.textContent = "Copied"; } catch { location.hash = link.split("#")[1]; }
  });
  byId("filters").addEventListener("reset", () => {
    for (const [name, options] of Object.entries(values)) options.forEach(([value]) => chosen[name].add(value));
    setTimeout(changed); // when the boxes are checked again
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const bar = byId("filters");
  new ResizeObserver(() => document.documentElement.style.setProperty("--bar", getComputedStyle(bar).position === "sticky" ? `${bar.offsetHeight}px` : "0px")).observe(bar);
}

// What is not chosen, as a fragment: #without=model:0.2;method:3
function linkOf(values) {
  const parts = Object.entries(values).map(([name, options]) => [name, options.map(([value], at) => (chosen[name].has(value) ? null : at)).filter((at) => at !== null)])
    .filter(([, without]) => without.length).map(([name, without]) => `${name}:${without.join(".")}`);
  return `${location.href.split("#")[0]}#without=${parts.join(";")}`;
}

function readLink(values) {
  if (!location.hash.startsWith("#without=")) return;
  for (const part of location.hash.slice(9).split(";")) {
    const [name, numbers] = part.split(":");
    if (!values[name] || !numbers) continue;
    const boxes = document.querySelectorAll(`[data-filter="${name}"] input`);
    numbers.split(".").map(Number).filter((at) => at in values[name]).forEach((at) => {
      chosen[name].delete(values[name][at][0]);
      boxes[at].checked = false;
    });
  }
}

function showCount() {
  const all = data.runs.filter((run) => run.status === "done").length;
  byId("count").textContent = `${finishedRuns().length} of ${all} finished runs shown`;
}
