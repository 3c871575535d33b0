// What is drawn of a cell: its seeds' points, their mean and Plotly's traces of them.
//
// The page has page.js after this in the same script. A *view* is what its controls say:
// {metric, axis, mean (or each seed), logX, logY}.

// Plotly reads some HTML in texts; ours are plain.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const average = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
const diverged = (seed) => seed.status === "diverged";

function divergences(cell) {
  const count = cell.seeds.filter(diverged).length;
  return count ? `${count} of ${cell.seeds.length} diverged` : "";
}

// A seed's curve: the points that have a place on both axes.
function pointsOf(seed, view) {
  const xs = seed.axes[view.axis.key] ?? [];
  const ys = seed.metrics[view.metric.key] ?? [];
  return seed.axes.update
    .map((update, i) => ({ update, x: xs[i] ?? null, y: ys[i] ?? null }))
    .filter(({ x, y }) => x !== null && y !== null)
    .filter(({ x, y }) => (!view.logX || x > 0) && (!view.logY || y > 0));
}

// The mean of curves at the updates that all of them have. It has a mean place too: seeds that make
// the same updates take different times.
function meanOf(curves) {
  const others = curves.map((points) => new Map(points.map((point) => [point.update, point])));
  return curves[0]
    .filter(({ update }) => others.every((points) => points.has(update)))
    .map(({ update }) => {
      const here = others.map((points) => points.get(update));
      const ys = here.map(({ y }) => y);
      const x = average(here.map((point) => point.x));
      return { update, x, y: average(ys), low: Math.min(...ys), high: Math.max(...ys) };
    });
}

// Plotly's traces of a cell: mean and band, or each seed, and a cross where a seed diverged.
function tracesOf(cell, view) {
  const measured = (seed) => seed.metrics[view.metric.key]?.some((y) => y !== null);
  if (!cell.seeds.some(measured)) return [];
  const seeds = cell.seeds.filter((seed) => measured(seed) || diverged(seed));
  const curves = seeds.map((seed) => pointsOf(seed, view));
  const name = plain([cell.label, divergences(cell)].filter(Boolean).join("; "));
  const [across, up] = [view.axis, view.metric].map(({ label }) => plain(label));
  const place = `<br>${across}: %{x:,.6~r}<br>${up}: %{y:.5~g}`;

  function trace(kind, points, about, style) {
    return {
      type: "scatter",
      name,
      legendgroup: cell.id,
      showlegend: false,
      meta: { kind, cell: cell.id },
      x: points.map(({ x }) => x),
      y: points.map(({ y }) => y),
      mode: points.length > 40 ? "lines" : "lines+markers",
      marker: { color: cell.color, size: 4 },
      hovertemplate: `<b>${plain(cell.label)}</b><br>${about}${place}<extra></extra>`,
      ...style,
      line: { color: cell.color, dash: cell.dash, ...style.line },
    };
  }

  const traces = [];
  const averaged = view.mean && seeds.length > 1;
  // The last point of a seed that diverged is the one in which that was found.
  const ended = (seed, { update }) => diverged(seed) && update === seed.axes.update.at(-1);
  const going = curves.map((points, i) => points.filter((point) => !ended(seeds[i], point)));
  const mean = averaged ? meanOf(going) : [];
  if (mean.length) {
    const upper = mean.map(({ x, high }) => ({ x, y: high }));
    const edge = upper.concat(mean.map(({ x, low }) => ({ x, y: low })).reverse());
    const fill = { fill: "toself", fillcolor: `${cell.color}2b`, line: { width: 0 } };
    const style = { ...fill, mode: "lines", hoverinfo: "skip", hovertemplate: null };
    traces.push(trace("band", edge, "", style));
    const about = `mean of seeds ${seeds.map(({ seed }) => seed).join(", ")}`;
    const spread = "<br>least %{customdata[0]:.5~g}, greatest %{customdata[1]:.5~g}<extra></extra>";
    const drawn = trace("mean", mean, about, { line: { width: 2.2 } });
    drawn.customdata = mean.map(({ low, high }) => [low, high]);
    drawn.hovertemplate = drawn.hovertemplate.replace("<extra></extra>", spread);
    traces.push(drawn);
  }
  // Where the mean ends before some seed does, thin lines say how the seeds went on.
  const end = mean.at(-1)?.update ?? -Infinity;
  const longer = curves.some((points) => points.length && points.at(-1).update > end);
  seeds.forEach((seed, i) => {
    if (!averaged || longer) {
      const thin = { mode: "lines", opacity: 0.6, line: { width: 0.9 } };
      const style = averaged ? thin : { line: { width: 1.6 } };
      traces.push(trace("seed", curves[i], `seed ${seed.seed}`, style));
    }
    if (diverged(seed) && curves[i].length) {
      const marker = { symbol: "x", size: 9, color: cell.color };
      const about = `seed ${seed.seed} diverged: ${plain(seed.reason)}`;
      traces.push(trace("diverged", [curves[i].at(-1)], about, { mode: "markers", marker }));
    }
  });
  const line = traces.find(({ meta }) => meta.kind === "mean" || meta.kind === "seed");
  if (line) line.showlegend = true;
  return traces;
}
