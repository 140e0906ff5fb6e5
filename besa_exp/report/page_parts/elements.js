// Elements and numbers. Text enters the page as text only, never as markup.

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const fill = (place, ...children) => place.replaceChildren(...children.flat());
const empty = (sentence) => element("p", { class: "empty" }, sentence);
const markupFree = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // for plotly

const unique = (values) => [...new Set(values)];
const unknown = (value) => value === null || value === undefined;
const percent = (value, digits = 2) => (unknown(value) ? "n/a" : `${(100 * value).toFixed(digits)} %`);
const targetName = (value) => `${+(100 * value).toFixed(4)} %`;
const significant = (value) => (unknown(value) ? "n/a" : value === 0 ? "0" : value.toPrecision(4));

function duration(seconds) {
  if (unknown(seconds)) return "n/a";
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  return seconds < 6000 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function bytes(number) {
  if (!number) return "n/a";
  return number < 2 ** 30 ? `${(number / 2 ** 20).toFixed(0)} MiB` : `${(number / 2 ** 30).toFixed(2)} GiB`;
}

function scoreText(kind, value) {
  return unknown(value) ? "n/a" : value.toFixed(kind === "zero_shot" ? 4 : 3);
}

// columns: [{head, of(row), number?, key?(row)}]; a head sorts where the column has a key.
// Of more than `limit` rows the first are shown, all on demand.
function table(columns, rows, { caption, tall, sorted, sortable, limit = Infinity } = {}) {
  const body = element("tbody");
  const heads = columns.map((column, index) => {
    const button = sortable && column.key ? element("button", { type: "button", onclick: () => sort(index) }, column.head) : column.head;
    return element("th", { scope: "col", class: column.number ? "number" : null }, button);
  });
  let direction = 0;
  let by = -1;
  function sort(index) {
    direction = by === index ? -direction : 1;
    by = index;
    heads.forEach((head, at) => (at === by ? head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending") : head.removeAttribute("aria-sort")));
    const { key } = columns[index];
    show([...rows].sort((a, b) => direction * compare(key(a), key(b))));
  }
  let most = limit;
  let last = rows;
  const more = element("button", { type: "button", class: "more-rows", onclick: () => { most = Infinity; show(last); } });
  function show(ordered) {
    last = ordered;
    more.textContent = `Show all ${ordered.length} rows`;
    more.hidden = ordered.length <= most;
    fill(body, ordered.slice(0, most).map((row) => element("tr", {}, columns.map((column, index) => {
      const content = column.of(row);
      const classes = [column.number ? "number" : column.class, column.tint ? column.tint(row) : null].filter(Boolean).join(" ");
      return element(index === 0 ? "th" : "td", { scope: index === 0 ? "row" : null, class: classes || null }, content);
    }))));
  }
  if (sortable && sorted !== undefined) sort(sorted);
  else show(rows);
  const scrolling = element("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": caption || "table" },
    element("table", {}, caption && !tall ? element("caption", {}, caption) : null, element("thead", {}, element("tr", {}, heads)), body));
  return limit === Infinity ? scrolling : element("div", {}, scrolling, more);
}

function compare(a, b) {
  if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
