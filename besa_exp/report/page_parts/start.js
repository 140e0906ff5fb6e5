// Puts the page together and redraws it when a choice, the theme or the width changes.

const options = (select, values, chosenValue) => {
  fill(select, values.map(([value, label]) => element("option", { value }, label)));
  if (chosenValue !== undefined) select.value = chosenValue;
};

function showAll() {
  showCount();
  document.querySelectorAll("[data-method]").forEach((mark) => fill(mark, glyph(Number(mark.dataset.method))));
  showResults();
  redrawCharts();
  offerRuns();
  showRun();
  showRuns();
  showApart();
}

const plural = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
const done = data.runs.filter((run) => run.status === "done").length;
byId("facts").textContent = `${plural(done, "finished run")} of ${plural(data.models.length, "model")} by ${plural(data.methods.length, "method")}`
  + (done < data.runs.length ? `; ${data.runs.length - done} not finished` : "");
byId("made").textContent = `Made by besa-exp ${data.version} from ${data.places.join(", ")}. Nothing on this page is fetched: charts and figures are in the file.`;

const tasks = data.measures.map((measure, index) => [index, measure.label, measure.kind]).filter(([, , kind]) => kind === "zero_shot");
const scores = data.measures.map((measure, index) => [index, measure.label, measure.main]).filter(([, , main]) => main);
const measured = (score) => data.cells.filter((cell) => cell.measure === score && !cell.apart).length;
const [most] = scores.map(([score]) => score).sort((one, other) => measured(other) - measured(one));
options(byId("score"), scores, most);
options(byId("size-score"), scores, most);
options(byId("task"), tasks);
byId("task").disabled = tasks.length === 0;
options(byId("depth-target"), unique(data.depth.map((line) => line.target)).sort((a, b) => a - b).map((target) => [target, targetName(target)]), data.depth_target);
options(byId("paper-measure"), data.paper.map((paper, index) => [index, paper.title]));
fill(byId("paper-others"), data.others.map((other) => element("li", {}, `${other.what}: ${other.value} (${other.source})`)));

buildFilters(showAll);
byId("score").addEventListener("change", showResults);
byId("beside").addEventListener("change", showRun);
byId("logarithmic").addEventListener("change", () => showScores("perplexity"));
byId("task").addEventListener("change", () => showScores("zero_shot"));
byId("depth-target").addEventListener("change", showDepth);
byId("chosen").addEventListener("change", showRun);
byId("paper-measure").addEventListener("change", showPaper);
function paint(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  showAll();
  showPaper();
}
darkness.addEventListener("change", () => paint(darkness.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => paint(isDark() ? "light" : "dark"));
byId("size-score").addEventListener("change", showSize);
narrow.addEventListener("change", showAll);
paint(document.documentElement.dataset.theme);
showUnfinished();
document.documentElement.dataset.ready = "true";
