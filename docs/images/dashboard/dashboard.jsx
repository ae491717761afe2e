// Draws a dashboard of Grafana's with Grafana's own components and what a Prometheus answers.
// The page is of the Prometheus' own origin, and has set `window.DASHBOARD` and `window.SECONDS` to show.
import { createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext, toDataFrame } from "@grafana/data";
import { GlobalStyles, PanelChrome, TimeSeries } from "@grafana/ui";
import React from "react";
import { createRoot } from "react-dom/client";
import "uplot/dist/uPlot.min.css";

const { DASHBOARD, SECONDS } = window;
const WIDTH = 1600, COLUMNS = 24, ROW = 30, MARGIN = 8; // pixels, as in Grafana
const RATE_INTERVAL = "20s"; // four scrapes of the compose file's, as Grafana computes it
const theme = createTheme({ colors: { mode: "light" } });
const until = Math.floor(Date.now() / 1000), since = until - SECONDS;
const timeRange = { from: dateTime(since * 1000), to: dateTime(until * 1000) };
timeRange.raw = { from: timeRange.from, to: timeRange.to };

async function query({ expr, legendFormat }) {
  const parameters = { query: expr.replaceAll("$__rate_interval", RATE_INTERVAL), start: since, end: until, step: 1 };
  const answer = await (await fetch(`/api/v1/query_range?${new URLSearchParams(parameters)}`)).json();
  if (answer.status !== "success") throw new Error(`${expr}: ${answer.error}`);
  return answer.data.result.map(({ metric, values }) => ({
    name: legendFormat.replaceAll(/{{\s*(\w+)\s*}}/g, (_, label) => metric[label] ?? ""),
    times: values.map(([time]) => time * 1000),
    values: values.map(([, value]) => Number(value)),
  }));
}

function frameOf({ name, times, values }, { defaults }, seriesIndex) {
  const custom = { drawStyle: "line", lineInterpolation: "linear", lineWidth: 1, fillOpacity: 0, showPoints: "never",
    spanNulls: false, axisPlacement: "auto", scaleDistribution: { type: "linear" }, stacking: { mode: "none" }, ...defaults.custom };
  const config = { color: { mode: "palette-classic" }, ...defaults, displayName: name, custom };
  const frame = toDataFrame({ fields: [
    { name: "time", type: FieldType.time, values: times, config: {} },
    { name: "value", type: FieldType.number, values, config },
  ] });
  for (const field of frame.fields) {
    field.state = { displayName: field.config.displayName, seriesIndex };
    field.display = getDisplayProcessor({ field, theme });
  }
  return frame;
}

function Panel({ panel, frames }) {
  const { x, y, w, h } = panel.gridPos, column = WIDTH / COLUMNS;
  const place = { position: "absolute", left: x * column, top: y * (ROW + MARGIN) };
  const legend = { showLegend: true, displayMode: "list", placement: "bottom", calcs: [] };
  return (
    <div style={place}>
      <PanelChrome title={panel.title} width={w * column - MARGIN} height={h * (ROW + MARGIN) - MARGIN}>
        {(width, height) => frames.length
          ? <TimeSeries frames={frames} timeRange={timeRange} timeZone="utc" width={width} height={height} legend={legend} />
          : <p style={{ textAlign: "center" }}>No data</p>}
      </PanelChrome>
    </div>
  );
}

const panels = await Promise.all(DASHBOARD.panels.map(async (panel) => {
  const found = (await Promise.all(panel.targets.map(query))).flat();
  return { panel, frames: found.map((series, place) => frameOf(series, panel.fieldConfig, place)) };
}));
const height = Math.max(...DASHBOARD.panels.map(({ gridPos: { y, h } }) => (y + h) * (ROW + MARGIN)));
const root = document.createElement("main");
document.body.append(root);
document.body.style.background = theme.colors.background.canvas;
createRoot(root).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <div style={{ position: "relative", width: WIDTH, height }}>
      {panels.map(({ panel, frames }) => <Panel key={panel.id} panel={panel} frames={frames} />)}
    </div>
  </ThemeContext.Provider>,
);
window.EMPTY = panels.filter(({ frames }) => !frames.length).map(({ panel }) => panel.title);
