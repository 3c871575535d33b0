// Fills each <div class="chart" data-experiment="NAME"> with controls and a chart.
//
// The data (#data): {scale, experiments: [{name, title, metrics: [{key, label, log}],
// axes: [{key, label}], cells: [{id, label, optimizer, size, color, dash,
// seeds: [{seed, status, reason, axes: {KEY: [...]}, metrics: {KEY: [...]}}]}]}]}.
// A cell is all runs that differ by seed only; null stands where there is no value.
// curves.js comes before this in the same script.

const dark = matchMedia("(prefers-color-scheme: dark)");
const print = matchMedia("print");
const touch = matchMedia("(pointer: coarse)");
const ON_PAPER = { width: 640, height: 400 }; // pixels: what fits an upright page
const DASHES = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" };

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function layoutOf(view, empty) {
  const styles = getComputedStyle(document.documentElement);
  const [ink, paper, line] = ["ink", "paper", "line"].map((name) =>
    styles.getPropertyValue(`--${name}`),
  );
  const axis = (label, log, ticks) => ({
    title: { text: plain(label) },
    type: log ? "log" : "linear",
    tickformat: log ? "~g" : "",
    tickfont: { size: 12 },
    nticks: log ? ticks : 0, // few, so that labels do not overlap; 0: Plotly's choice
    automargin: true,
    gridcolor: line,
    linecolor: line,
    zerolinecolor: line,
  });
  const middle = { xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false };
  return {
    xaxis: axis(view.axis.label, view.logX, print.matches ? 5 : 0),
    yaxis: axis(view.metric.label, view.logY, 4),
    annotations: empty ? [{ ...middle, text: "No curve to draw here" }] : [],
    font: { family: styles.fontFamily, size: 13, color: ink },
    hoverlabel: { align: "left", bgcolor: paper, bordercolor: line, font: { color: ink } },
    paper_bgcolor: paper,
    plot_bgcolor: paper,
    margin: { l: 56, r: 12, t: 28, b: 48 },
    hovermode: "closest",
    dragmode: touch.matches ? false : "zoom", // a finger on the chart scrolls the page
    showlegend: false, // the list of curves is the legend
    autosize: !print.matches,
    ...(print.matches ? ON_PAPER : {}),
    uirevision: [view.metric.key, view.axis.key, view.logX, view.logY].join(), // keeps a zoom
  };
}

// Plotly's own button saves what it sees; a picture needs the legend too.
const SAVE = {
  name: "Save as PNG",
  icon: Plotly.Icons.camera,
  click: ({ data, layout }) =>
    Plotly.downloadImage(
      { data, layout: { ...layout, showlegend: true } },
      { format: "png", width: 1200, height: 600, scale: 2, filename: layout.meta },
    ),
};
const CONFIG = {
  responsive: true,
  displaylogo: false,
  // By name, so that no button gets here unasked: some versions upload the chart.
  modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", SAVE]],
};

function swatch(cell) {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  line.setAttribute("class", "swatch");
  line.setAttribute("aria-hidden", "true");
  line.innerHTML = '<line x1="0" y1="50%" x2="100%" y2="50%" stroke-width="3"/>';
  line.firstChild.setAttribute("stroke", cell.color);
  line.firstChild.setAttribute("stroke-dasharray", DASHES[cell.dash] ?? "");
  return line;
}

const labelled = (...children) => element("label", {}, ...children);
const checkbox = (name, value, checked) =>
  element("input", { type: "checkbox", name, value, checked });
function select(name, entries) {
  const choices = entries.map(({ key, label }) => new Option(label, key));
  return element("select", { name, ariaLabel: name }, ...choices);
}

function buildChart(place, experiment) {
  const metric = select("metric", experiment.metrics);
  const axis = select("against", experiment.axes);
  const shown = select("seeds", [
    { key: "mean", label: "mean, least to greatest" },
    { key: "each", label: "each" },
  ]);
  const logX = checkbox("log-x", "", true);
  const logY = checkbox("log-y", "", experiment.metrics[0].log);
  const options = element("div", { className: "options" });
  options.append(labelled("metric", metric), labelled("against", axis));
  options.append(labelled("seeds", shown), labelled(logX, "log horizontal"));
  options.append(labelled(logY, "log vertical"));

  const boxes = new Map(); // cell -> its checkbox; one in a disabled fieldset does not count
  const curves = element("div", { className: "curves" });
  for (const optimizer of new Set(experiment.cells.map((cell) => cell.optimizer))) {
    const all = checkbox("optimizer", optimizer, true);
    const list = element("div", {});
    const legend = element("legend", {}, labelled(all, optimizer));
    const group = element("fieldset", {}, legend, list);
    for (const cell of experiment.cells.filter((cell) => cell.optimizer === optimizer)) {
      const box = checkbox("cell", cell.id, true);
      const count = element("span", { className: "count" }, divergences(cell));
      const text = element("span", {}, `${cell.size} `, count);
      list.append(labelled(box, swatch(cell), text));
      boxes.set(cell, box);
    }
    all.addEventListener("change", () => (group.disabled = !all.checked));
    curves.append(group);
  }

  const plot = element("div", { className: "plot", role: "figure" });
  const ends = element("ul", { className: "ends" });
  place.append(options, plot, curves, ends);

  function draw() {
    const view = {
      metric: experiment.metrics.find(({ key }) => key === metric.value),
      axis: experiment.axes.find(({ key }) => key === axis.value),
      mean: shown.value === "mean",
      logX: logX.checked,
      logY: logY.checked,
    };
    const cells = experiment.cells.filter((cell) => boxes.get(cell).matches(":checked:enabled"));
    const traces = cells.flatMap((cell) => tracesOf(cell, view));
    const layout = layoutOf(view, !traces.length);
    layout.meta = `${experiment.name}-${view.metric.key}`; // what a saved picture is called
    plot.ariaLabel = `${experiment.title}: ${view.metric.label} over ${view.axis.label}`;
    Plotly.react(plot, traces, layout, CONFIG);
    const told = (cell, seed) => `${cell.label}, seed ${seed.seed} diverged: ${seed.reason}`;
    const lost = cells.flatMap((cell) =>
      cell.seeds.filter(diverged).map((seed) => element("li", {}, told(cell, seed))),
    );
    ends.replaceChildren(...lost);
  }

  metric.addEventListener("change", () => {
    logY.checked = experiment.metrics.find(({ key }) => key === metric.value).log;
  });
  place.addEventListener("change", draw); // bubbles up to here after the controls' own listeners
  for (const media of [dark, print]) media.addEventListener("change", draw);
  draw();
}

const data = JSON.parse(document.getElementById("data").textContent);
for (const place of document.querySelectorAll(".chart[data-experiment]")) {
  const experiment = data.experiments.find(({ name }) => name === place.dataset.experiment);
  if (experiment) buildChart(place, experiment);
  else place.append(element("p", {}, "There are no curves of this experiment yet."));
}
for (const table of document.querySelectorAll("main table")) {
  const scroll = element("div", { className: "scroll", tabIndex: 0, role: "group" });
  scroll.ariaLabel = "table";
  table.replaceWith(scroll);
  scroll.append(table);
}
