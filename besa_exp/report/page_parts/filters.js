// What the reader chose: models, methods and targets. Dense scores have no target: they stay as the line to compare with.

const data = JSON.parse(byId("data").textContent);
const chosen = {
  model: new Set(data.models),
  method: new Set(data.methods.map((_, index) => index)),
  target: new Set(data.targets),
};

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
  byId("filters").addEventListener("reset", () => {
    for (const [name, options] of Object.entries(values)) options.forEach(([value]) => chosen[name].add(value));
    setTimeout(changed); // when the boxes are checked again
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  if (matchMedia("(max-width: 760px)").matches) byId("filter-box").open = false;
}

function showCount() {
  const all = data.runs.filter((run) => run.status === "done").length;
  byId("count").textContent = `${finishedRuns().length} of ${all} finished runs shown`;
}
